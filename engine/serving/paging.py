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
        raise not_of_this_list() from error


def token_after(time_s: float, name: str) -> str:
    """The token of the page behind an item of a list by time, then name."""
    return page_token(f"{time_s!r} {name}")


def time_and_name(token: str) -> tuple[float, str] | None:
    """What is in such a token, None for an empty one; raises `InvalidRequest` as `key_of`."""
    key = key_of(token)
    if not key:
        return None
    time_s, _, name = key.partition(" ")
    try:
        return float(time_s), name
    except ValueError as error:
        raise not_of_this_list() from error


def not_of_this_list() -> InvalidRequest:
    """The error for a token that another list has given out, or nobody."""
    return InvalidRequest(
        "page_token is not one of this list; pass next_page_token on as it is", field="page_token"
    )
