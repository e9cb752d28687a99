"""Where client and server meet: the defaults that both sides share."""

DEFAULT_ADDRESS = "127.0.0.1:50051"
MAX_MESSAGE_BYTES = 16 << 20  # each way; a picture of a million pixels has some 3 MB as PNG
