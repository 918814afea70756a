"""A header whose name is any bytes: other languages' clients send such, the one for Python only by its C library."""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import ClassVar

import confluent_kafka

# From librdkafka's rdkafka.h, `rd_kafka_vtype_t`.
_TOPIC, _PARTITION, _VALUE, _HEADER = 1, 3, 4, 9


class _Bytes(ctypes.Structure):
    _fields_: ClassVar = [("start", ctypes.c_char_p), ("size", ctypes.c_size_t)]


class _Header(ctypes.Structure):
    _fields_: ClassVar = [("name", ctypes.c_char_p), ("value", ctypes.c_char_p), ("size", ctypes.c_ssize_t)]


class _Content(ctypes.Union):
    _fields_: ClassVar = [
        ("text", ctypes.c_char_p),
        ("number", ctypes.c_int32),
        ("bytes", _Bytes),
        ("header", _Header),
        ("padding", ctypes.c_char * 64),
    ]


class _Part(ctypes.Structure):
    _fields_: ClassVar = [("kind", ctypes.c_int), ("content", _Content)]


def send_with_header(servers: str, topic: str, partition: int, value: bytes, name: bytes, times: int) -> None:
    """Publish a message with a header of this name so many times, and wait until the broker has them."""
    library = _librdkafka()
    said = ctypes.create_string_buffer(512)
    settings = ctypes.c_void_p(library.rd_kafka_conf_new())
    assert library.rd_kafka_conf_set(settings, b"bootstrap.servers", servers.encode(), said, len(said)) == 0, said.value
    producer = ctypes.c_void_p(library.rd_kafka_new(0, settings, said, len(said)))
    assert producer, said.value
    parts = (_Part * 4)(
        _Part(_TOPIC, _Content(text=topic.encode())),
        _Part(_PARTITION, _Content(number=partition)),
        _Part(_VALUE, _Content(bytes=_Bytes(value, len(value)))),
        _Part(_HEADER, _Content(header=_Header(name, b"value", 5))),
    )
    for _ in range(times):
        assert library.rd_kafka_produceva(producer, parts, ctypes.c_size_t(len(parts))) is None
    assert library.rd_kafka_flush(producer, 30_000) == 0
    library.rd_kafka_destroy(producer)


def _librdkafka() -> ctypes.CDLL:
    package = Path(confluent_kafka.__file__).parent
    (path,) = [*package.parent.glob("confluent_kafka.libs/librdkafka*"), *package.glob(".dylibs/librdkafka*")]
    library = ctypes.CDLL(str(path))
    for name in ("rd_kafka_conf_new", "rd_kafka_new", "rd_kafka_produceva"):
        getattr(library, name).restype = ctypes.c_void_p
    return library
