"""Lists page by page: how many on a page, and where the next one begins."""

import base64
import binascii

from engine.errors import InvalidRequest

DEFAULT_PAGE_SIZE = 100
MAX_PAGE_SIZE = 1000


def checked_page_size(page_size: int) -> int:
    """The page size to use, 0 being the default; raises `InvalidRequest` out of range."""
    if not 0 <= page_size <= MAX_PAGE_SIZE:
        raise InvalidRequest(
            f"page_size must be between 1 and {MAX_PAGE_SIZE}, got {page_size}", field="page_size"
        )
    return page_size or DEFAULT_PAGE_SIZE


def page_token(last_key: str) -> str:
    """The token of the page behind the item with this key."""
    return base64.urlsafe_b64encode(last_key.encode()).decode()


def key_of(token: str) -> str:
    """The key in a token, empty for an empty one; raises `InvalidRequest` for one of another's."""
    try:
        return base64.b64decode(token.encode(), altchars=b"-_", validate=True).decode()
    except (binascii.Error, ValueError) as error:
        raise InvalidRequest(
            "page_token is not one of this server's; pass next_page_token on as it is",
            field="page_token",
        ) from error
