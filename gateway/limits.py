"""Who may ask, and how much: keys, requests in flight, tokens a minute."""

import hashlib
import hmac
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import yaml
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from gateway.errors import ApiError, from_validation


class KeysError(ValueError):
    """The file of keys cannot be used; the message says where and why."""


class Key(BaseModel):
    """One entry of the file of keys.

    Attributes:
        name: what metrics and logs call its holder.
        key: what the holder sends. Or sha256 instead: its SHA-256 in hexadecimal, so that the file holds no secret.
        requests: in flight at once, at most. tokens_per_minute: of prompts and answers, at most. None is no limit.
    """

    model_config = ConfigDict(extra="forbid", strict=True)
    name: Annotated[str, Field(min_length=1, max_length=64)]
    key: Annotated[str, Field(min_length=8)] | None = None
    sha256: Annotated[str, Field(pattern="^[0-9a-f]{64}$")] | None = None
    requests: Annotated[int, Field(ge=1)] | None = None
    tokens_per_minute: Annotated[int, Field(ge=1)] | None = None

    @property
    def digest(self) -> bytes:
        return bytes.fromhex(self.sha256) if self.sha256 else hashlib.sha256(str(self.key).encode()).digest()


class Account:
    """What the holder of a key uses.

    Tokens are counted when they have come, as none knows before how many an answer takes: a holder's balance may fall below
    zero, and nothing more is taken in until the minute's flow has filled it again.
    """

    def __init__(self, name: str, requests: int | None = None, tokens_per_minute: int | None = None) -> None:
        self.name, self.requests, self.tokens_per_minute = name, requests, tokens_per_minute
        self.in_flight = 0
        self._balance, self._at = float(tokens_per_minute or 0), time.monotonic()

    @contextmanager
    def request(self) -> Iterator[None]:
        """Hold a place for a request.

        Raises:
            ApiError: 429, the holder has used up what it may.
        """
        if self.requests is not None and self.in_flight >= self.requests:
            raise ApiError(
                429,
                f"requests: found {self.in_flight} of {self.name} in flight, allowed: {self.requests}",
                code="rate_limit_exceeded",
                retry_after=1,
            )
        if self.tokens_per_minute is not None and self._filled() <= 0:
            wait = (1 - self._balance) * 60 / self.tokens_per_minute
            raise ApiError(
                429,
                f"tokens_per_minute: {self.name} has used its {self.tokens_per_minute}, allowed: again in {wait:.0f} s",
                code="rate_limit_exceeded",
                retry_after=wait,
            )
        self.in_flight += 1
        try:
            yield
        finally:
            self.in_flight -= 1

    def spend(self, tokens: int) -> None:
        if self.tokens_per_minute is not None:
            self._balance = self._filled() - tokens

    def _filled(self) -> float:
        now, full = time.monotonic(), float(self.tokens_per_minute or 0)
        self._balance, self._at = min(full, self._balance + (now - self._at) * full / 60), now
        return self._balance


class Keys:
    """The keys that are let in.

    Args:
        keys: none lets everybody in.
    """

    def __init__(self, keys: Sequence[Key] = ()) -> None:
        self._accounts = [(key.digest, Account(key.name, key.requests, key.tokens_per_minute)) for key in keys]
        self._anyone = Account("anyone")

    @classmethod
    def read(cls, file: Path) -> "Keys":
        """Read a YAML list of keys.

        Raises:
            KeysError: naming the key's path, what was found, what is allowed.
        """
        try:
            raw = yaml.safe_load(file.read_text(encoding="utf-8"))
            keys = TypeAdapter(Annotated[list[Key], Field(min_length=1)]).validate_python(raw)
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            raise KeysError(f"{file}: {' '.join(str(error).split())}") from None
        except ValidationError as error:
            raise KeysError(f"{file}: {from_validation(error.errors()).message}") from None
        for number, key in enumerate(keys):
            if (key.key is None) == (key.sha256 is None):
                raise KeysError(f"{file}: [{number}]: allowed: one of key and sha256")
        if len({key.name for key in keys}) < len(keys) or len({key.digest for key in keys}) < len(keys):
            raise KeysError(f"{file}: two entries of the same name or key")
        return cls(keys)

    def account(self, authorization: str) -> Account:
        """Whose a request is, by its Authorization header. Every key is compared, in constant time.

        Raises:
            ApiError: 401.
        """
        if not self._accounts:
            return self._anyone
        scheme, _, sent = authorization.partition(" ")
        digest = hashlib.sha256(sent.strip().encode("utf-8", "surrogateescape")).digest()
        found = [account for known, account in self._accounts if hmac.compare_digest(known, digest)]
        if scheme.lower() != "bearer" or not found:
            raise ApiError(401, "Authorization: allowed: Bearer and a key that is known here", code="invalid_api_key")
        return found[0]
