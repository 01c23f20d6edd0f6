"""Schemas of records: from a schema registry with Confluent's interface, or from a folder.

Both are `stream_ctr.events.avro_events.Schemas`. A schema that was found once is kept, because the
schema of an id never changes. What was not found is asked for again after half a minute.

A registry that does not answer is asked again, for `PATIENCE_SECONDS`, before `RegistryUnreachable`
is raised: then nothing is known about the record, so it must not be rejected. The client is that of
the standard library; a schema is fetched once.
"""

from __future__ import annotations

import base64
import json
import logging
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from typing import Any

from stream_ctr.connectors.errors import RegistryFailure, RegistryRefused, RegistryUnreachable

_log = logging.getLogger(__name__)

PATIENCE_SECONDS = 20.0
_TIMEOUT_SECONDS = 5.0
_FIRST_PAUSE_SECONDS = 0.25
_ASKED_AGAIN_SECONDS = 30.0
_MOST_UNKNOWN = 10_000
_LARGEST_ANSWER = 4 << 20
_MOST_REFERENCES = 100
_NOT_FOUND_CODES = (40401, 40402, 40403)  # subject, version, schema
_BUSY = (408, 425, 429)
_SUFFIXES = (".avsc", ".json")


@dataclass(frozen=True, slots=True)
class Schema:
    """A schema as it was written; see `stream_ctr.events.avro_events.WrittenSchema`."""

    type: str
    text: str
    references: tuple[str, ...] = ()


class _Unknown:
    """The schemas that were not found, each with the time at which it may be asked for again."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._until: dict[int, float] = {}

    def __contains__(self, number: int) -> bool:
        return self._until.get(number, 0.0) > self._clock()

    def add(self, number: int) -> None:
        if len(self._until) >= _MOST_UNKNOWN:
            self._until.clear()
        self._until[number] = self._clock() + _ASKED_AGAIN_SECONDS


class SchemaFolder:
    """Schemas in a folder: `<id>.avsc` by id, and each by its fingerprint, whatever its name.

    `fingerprint` returns the fingerprint of a schema's text, and raises `ValueError` if there is
    none. Raises `RegistryFailure` if the folder cannot be read.
    """

    def __init__(
        self,
        folder: Path,
        *,
        fingerprint: Callable[[str], int],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.name = f"the schema folder {folder}"
        self._folder = folder
        self._fingerprint = fingerprint
        self._unknown = _Unknown(clock)
        self._by_id: dict[int, Schema] = {}
        self._by_fingerprint: dict[int, Schema] = {}
        self._read()

    def by_id(self, id: int) -> Schema | None:
        return self._find(id, self._by_id)

    def by_fingerprint(self, fingerprint: int) -> Schema | None:
        return self._find(fingerprint, self._by_fingerprint)

    def _find(self, number: int, known: Mapping[int, Schema]) -> Schema | None:
        if number not in known and number not in self._unknown:
            self._read()
            if number not in known:
                self._unknown.add(number)
        return known.get(number)

    def _read(self) -> None:
        try:
            paths = sorted(path for path in self._folder.iterdir() if path.suffix in _SUFFIXES)
            texts = [path.read_text("utf-8") for path in paths]
        except (OSError, UnicodeDecodeError) as error:
            raise RegistryFailure(f"{self.name} cannot be read: {error}") from None
        for path, text in zip(paths, texts, strict=True):
            schema = Schema("AVRO", text)
            if path.stem.isascii() and path.stem.isdecimal():
                self._by_id.setdefault(int(path.stem), schema)
            try:
                self._by_fingerprint.setdefault(self._fingerprint(text), schema)
            except ValueError as error:
                raise RegistryFailure(f"{path} is no Avro schema: {error}") from None


class SchemaRegistry:
    """Schemas of a registry with Confluent's REST interface at `url`.

    `login` is "user:password" or, with `bearer`, a token. Methods raise `RegistryRefused` when the
    registry refuses it, `RegistryUnreachable` when it does not answer, and `RegistryFailure` when
    it does not answer as a registry does.
    """

    def __init__(
        self,
        url: str,
        *,
        login: str = "",
        bearer: bool = False,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self.name = f"the schema registry {url}"
        self._url = url.rstrip("/")
        self._headers = {"Accept": "application/vnd.schemaregistry.v1+json, application/json"}
        if login:
            plain = "".join([login]).encode()  # a secret shows itself only to these methods
            token = plain if bearer else base64.b64encode(plain)
            self._headers["Authorization"] = f"{'Bearer' if bearer else 'Basic'} {token.decode()}"
        self._clock = clock
        self._sleep = sleep
        self._unknown = _Unknown(clock)
        self._by_id: dict[int, Schema] = {}
        # A redirect could take the login elsewhere.
        self._opener = urllib.request.build_opener(_NoRedirects)

    def by_id(self, id: int) -> Schema | None:
        if id not in self._by_id and id not in self._unknown:
            answer = self._get(f"/schemas/ids/{id}")
            if answer is None:
                self._unknown.add(id)
            else:
                self._by_id[id] = self._schema(answer)
        return self._by_id.get(id)

    def by_fingerprint(self, fingerprint: int) -> Schema | None:
        """Return None: a registry knows schemas by their id."""
        return None

    def _schema(self, answer: Mapping[str, Any]) -> Schema:
        references: dict[tuple[str, str], str] = {}
        self._collect(answer, references)
        return Schema(
            str(answer.get("schemaType", "AVRO")),
            str(answer["schema"]),
            tuple(references.values()),
        )

    def _collect(self, answer: Mapping[str, Any], into: dict[tuple[str, str], str]) -> None:
        """Add the texts of the schemas that one refers to, each after those that it refers to."""
        for reference in answer.get("references") or ():
            key = str(reference.get("subject")), str(reference.get("version"))
            if key in into:
                continue
            if len(into) >= _MOST_REFERENCES:
                raise RegistryFailure(f"{self.name}: a schema has too many references")
            subject, version = (urllib.parse.quote(part, safe="") for part in key)
            found = self._get(f"/subjects/{subject}/versions/{version}")
            if found is None:
                raise RegistryFailure(f"{self.name} lacks {key[0]} version {key[1]}, a reference")
            into[key] = ""  # a circle ends here
            self._collect(found, into)
            del into[key]
            into[key] = str(found["schema"])

    def _get(self, path: str) -> dict[str, Any] | None:
        """Return an answer, None if there is no such schema, however long the registry takes."""
        deadline = self._clock() + PATIENCE_SECONDS
        pause = _FIRST_PAUSE_SECONDS
        warned = False
        while True:
            try:
                answer = self._ask(path)
            except RegistryUnreachable as error:
                if self._clock() + pause > deadline:
                    raise
                if not warned:
                    _log.warning("%s; asking again for %.0f s", error, PATIENCE_SECONDS)
                    warned = True
                self._sleep(pause)
                pause *= 2
            else:
                if warned:
                    _log.warning("%s answers again", self.name)
                return answer

    def _ask(self, path: str) -> dict[str, Any] | None:
        request = urllib.request.Request(self._url + path, headers=self._headers)
        try:
            with self._opener.open(request, timeout=_TIMEOUT_SECONDS) as response:
                body = response.read(_LARGEST_ANSWER + 1)
        except urllib.error.HTTPError as error:
            self._require_missing(path, error)
            return None
        except (OSError, HTTPException) as error:
            reason = getattr(error, "reason", error)
            raise RegistryUnreachable(f"{self.name} does not answer: {reason}") from None
        answer = _as_object(body)
        if answer is None or "schema" not in answer or len(body) > _LARGEST_ANSWER:
            raise RegistryFailure(
                f"{self.name} answers {path}, but not as a schema registry does; "
                "is the path of the URL that of its Confluent interface?"
            )
        return answer

    def _require_missing(self, path: str, error: urllib.error.HTTPError) -> None:
        """Raise an error unless the answer is that there is no such schema."""
        status = error.code
        try:
            answer = _as_object(error.read(_LARGEST_ANSWER))
        except (OSError, HTTPException):
            answer = None
        if status == 404 and answer and answer.get("error_code") in _NOT_FOUND_CODES:
            return
        if status in (401, 403):
            raise RegistryRefused(
                f"{self.name} refuses the login (HTTP {status}); set basic.auth.user.info or "
                "bearer.auth.token in the client properties"
            ) from None
        if status in _BUSY or status >= 500:
            raise RegistryUnreachable(f"{self.name} answers with HTTP {status}") from None
        raise RegistryFailure(
            f"{self.name} answers {path} with HTTP {status}; "
            "is the path of the URL that of its Confluent interface?"
        ) from None


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *_: Any) -> None:
        return None


def _as_object(body: bytes) -> dict[str, Any] | None:
    try:
        found = json.loads(body)
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None
