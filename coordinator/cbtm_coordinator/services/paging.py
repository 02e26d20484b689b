"""Page sizes and tokens (AIP-158): a token is opaque to callers, and says after which key the next page begins."""

from __future__ import annotations

import base64
import json
from typing import Any

from cbtm_common.errors import InvalidArgument

DEFAULT_PAGE, MAX_PAGE = 100, 1000


def page_size(asked: int) -> int:
    if asked < 0:
        raise InvalidArgument(f"page_size: {asked} is negative", field="page_size")
    return min(asked or DEFAULT_PAGE, MAX_PAGE)


def encode(key: Any) -> str:
    return base64.urlsafe_b64encode(json.dumps(key).encode()).decode()


def decode(token: str, default: Any) -> Any:
    """The key in a token, `default` when there is none. Raises InvalidArgument for a token that is not ours."""
    if not token:
        return default
    try:
        key = json.loads(base64.urlsafe_b64decode(token.encode()))
    except ValueError as error:
        raise InvalidArgument("page_token: is not one of ours", field="page_token") from error
    if type(key) is not type(default) and default is not None:
        raise InvalidArgument("page_token: is not of this listing", field="page_token")
    return key
