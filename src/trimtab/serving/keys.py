"""API keys: made at random, kept as salted hashes, compared in constant time. No torch."""

import hashlib
import hmac
import secrets
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from trimtab.errors import InputError
from trimtab.store.files import lock, read_json, write_json

KEY_BYTES = 32
_PREFIX = "trimtab-"


class KeyEntry(BaseModel):
    """What is kept of a key.

    A key has 256 random bits, so that a plain hash cannot be turned back; slow hashes are for
    passwords, which people choose. The salt keeps two files from being compared.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str = Field(min_length=1, max_length=64)
    salt: str
    sha256: str = Field(pattern="^[0-9a-f]{64}$")
    admin: bool = False
    requests_per_minute: int | None = Field(default=None, ge=1)

    def opens(self, key: str) -> bool:
        """Whether this is the key, in a time that does not depend on how nearly it is."""
        return hmac.compare_digest(_digest(self.salt, key), self.sha256)


class KeyFile(BaseModel):
    """The file of keys."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    schema_: Literal["trimtab.keys"] = Field(default="trimtab.keys", alias="schema")
    version: Literal[1] = 1
    keys: tuple[KeyEntry, ...] = ()


def read_keys(path: Path) -> tuple[KeyEntry, ...]:
    """Read a file of keys.

    Raises:
        InputError: It is not there, or not such a file.
    """
    hint = "make one with `trimtab key NAME --keys FILE`"
    if not path.is_file():
        raise InputError(f"there is no file of API keys {path}", hint=hint)
    try:
        return KeyFile.model_validate(read_json(path, "file of API keys")).keys
    except ValidationError as error:
        problem = error.errors(include_url=False)[0]
        where = ".".join(map(str, problem["loc"]))
        raise InputError(
            f"{path} is no file of API keys: {where}: {problem['msg']}",
            hint=hint,
        ) from error


def add_key(
    path: Path, name: str, *, admin: bool = False, requests_per_minute: int | None = None
) -> str:
    """Make a key and add its hash to a file, which is made where there is none.

    Args:
        path: The file.
        name: Whose key it is; the log and the metrics show it.
        admin: May load and unload adapters.
        requests_per_minute: Its own limit.

    Returns:
        The key, which is kept nowhere else.

    Raises:
        InputError: The name is taken or empty, or the file is no file of keys.
    """
    key, salt = _PREFIX + secrets.token_urlsafe(KEY_BYTES), secrets.token_hex(16)
    path.parent.mkdir(parents=True, exist_ok=True)
    with lock(path.parent):
        entries = read_keys(path) if path.exists() else ()
        if not name.strip() or len(name) > 64:
            raise InputError(
                f"a key cannot be called {name!r}", hint="give a name of 1 to 64 characters"
            )
        if any(entry.name == name for entry in entries):
            raise InputError(
                f"{path} has a key called {name!r} already",
                hint="take another name, or delete the old entry from the file",
            )
        entry: dict[str, Any] = {"name": name, "salt": salt, "sha256": _digest(salt, key)}
        entry |= {"admin": admin, "requests_per_minute": requests_per_minute}
        made = KeyFile(keys=(*entries, KeyEntry.model_validate(entry)))
        write_json(path, made.model_dump(mode="json", by_alias=True))
        path.chmod(0o600)
    return key


def _digest(salt: str, key: str) -> str:
    return hashlib.sha256(f"{salt}{key}".encode("utf-8", "surrogatepass")).hexdigest()
