"""Where the schemas of Avro records come from, by the configuration and the client properties."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from stream_ctr.config import Config
from stream_ctr.connectors import kafka
from stream_ctr.connectors.kafka.options import Secret
from stream_ctr.connectors.record_schemas import SchemaFolder, SchemaRegistry
from stream_ctr.errors import ConfigError
from stream_ctr.events.avro_events import Schemas
from stream_ctr.events.avro_schema import fingerprint

# The names of Confluent's clients, with and without this prefix.
_PREFIX = "schema.registry."
_USER_INFO = "basic.auth.user.info"
_TOKEN = "bearer.auth.token"
_URL = "schema.registry.url"
_PROPERTIES = {
    _URL,
    *(
        prefix + name
        for prefix in ("", _PREFIX)
        for name in (
            _USER_INFO,
            _TOKEN,
            "basic.auth.credentials.source",
            "bearer.auth.credentials.source",
        )
    ),
}
_ENVIRONMENT = "SCHEMA_REGISTRY_BASIC_AUTH_USER_INFO"

Properties = Mapping[str, str]


def without_registry(properties: Properties) -> dict[str, str]:
    """Return client properties without those of a schema registry.

    >>> without_registry({"acks": "all", "basic.auth.user.info": "user:hidden"})
    {'acks': 'all'}
    """
    return {name: value for name, value in properties.items() if name not in _PROPERTIES}


def registry_properties(kafka_config: Path | None, properties: Properties) -> dict[str, str]:
    """Return the properties of a schema registry, from a file and from -X pairs.

    A login that they lack is taken from the environment. It prints as `***`.
    """
    given = {**(kafka.read_properties(kafka_config) if kafka_config else {}), **properties}
    found = {
        name.removeprefix(_PREFIX) if name != _URL else name: Secret(value)
        for name, value in given.items()
        if name in _PROPERTIES
    }
    if _ENVIRONMENT in os.environ and not {_USER_INFO, _TOKEN} & found.keys():
        found[_USER_INFO] = Secret(os.environ[_ENVIRONMENT])
    return dict(found)


def open_schemas(config: Config, properties: Properties | None = None) -> Schemas | None:
    """Return the schemas of Avro records, None if neither registry nor folder is configured.

    Raises `ConfigError` if both are, and `RegistryFailure` if the folder cannot be read.
    """
    properties = properties or {}
    url = config.input.schema_registry or "".join([properties.get(_URL, "")])
    if "@" in url:
        raise ConfigError(
            f"{_URL}: a login goes into the client property {_USER_INFO} (the value is not shown)"
        )
    folder = config.input.schema_folder
    if url and folder:
        raise ConfigError(
            "input.schema_registry and input.schema_folder exclude each other: "
            "the id of a schema must have one meaning"
        )
    if folder:
        return SchemaFolder(Path(folder), fingerprint=fingerprint)
    if not url:
        return None
    user_info = properties.get(_USER_INFO, "")
    token = properties.get(_TOKEN, "")
    return SchemaRegistry(url, login=token or user_info, bearer=bool(token))
