"""Messages to a node, and its answer to ``hello``."""

from __future__ import annotations

import json

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict

from fedalign.errors import WireError
from fedalign.wire.coarse import FLOAT32, decode, encode, from_record, to_record
from fedalign.wire.records import (
    F32,
    MAX_CLIENTS,
    OK,
    PROTOCOL,
    STATUS,
    Hello,
    Manifest,
    Request,
)
from fedalign.wire.values import array, ints, name


def encode_request(request: Request, adapter: ArrayRecord | None = None) -> RecordDict:
    """Return the content of a message to a node; ``adapter`` is shared between messages."""
    config: dict[str, str | int | list[str]] = {
        "protocol": PROTOCOL,
        "phase": request.phase,
        "round": request.round,
        "attempt": request.attempt,
        "clients": list(request.clients),
        "config": request.config_json,
        "manifest": request.manifest_hash,
        "splits": list(request.splits),
    }
    records: dict[str, ArrayRecord | ConfigRecord] = {"request": ConfigRecord(config)}  # type: ignore[arg-type]
    if adapter is not None:
        records["adapter"] = adapter
    return RecordDict(records)  # type: ignore[arg-type]


def decode_request(content: RecordDict) -> Request:
    """Read the shared part of a message; ``WireError`` for another protocol or a broken record."""
    try:
        c = content.config_records["request"]
        protocol = int(c["protocol"])  # type: ignore[arg-type]
        request = Request(
            phase=str(c["phase"]),
            round=int(c["round"]),  # type: ignore[arg-type]
            attempt=int(c["attempt"]),  # type: ignore[arg-type]
            clients=tuple(str(x) for x in c["clients"]),  # type: ignore[union-attr]
            config_json=str(c["config"]),
            manifest_hash=str(c["manifest"]),
            splits=tuple(str(x) for x in c["splits"]),  # type: ignore[union-attr]
        )
    except (KeyError, TypeError, ValueError, OverflowError):
        raise WireError("bad-request") from None
    if protocol != PROTOCOL:
        raise WireError("protocol", f"this side speaks {PROTOCOL}, the message {protocol}")
    return request


def adapter_record(flat: F32) -> ArrayRecord:
    """Wrap a flat adapter (P,) float32 for sending."""
    return ArrayRecord({"adapter": Array(np.ascontiguousarray(flat, dtype=np.float32))})


def decode_adapter(content: RecordDict, manifest: Manifest) -> F32:
    """Return the broadcast adapter (manifest.size,) float32; anything else is a ``WireError``."""
    return array(content, "adapter", (manifest.size,))


def broadcast_record(flat: F32, manifest: Manifest, precision: str) -> ArrayRecord:
    """Wrap a whole adapter (size,) for the messages of a round of training.

    In float32 it travels as it is.  In another precision only what clients send back travels:
    under frozen A that is B, since A follows from the run's seed (``initial_adapter``).
    """
    if precision == FLOAT32:
        return adapter_record(flat)
    sent = flat[manifest.upload_mask()][None]
    return to_record("adapter", encode(sent, manifest.upload, precision))


def decode_broadcast(content: RecordDict, manifest: Manifest, precision: str) -> F32:
    """Return what a round of training sends coarsely, (upload size,); finite, else ``WireError``.

    For float32 there is :func:`decode_adapter`.
    """
    (flat,) = decode(
        from_record(content, "adapter", 1, manifest.upload, precision), manifest.upload
    )
    if not np.isfinite(flat).all():
        raise WireError("bad-array", "entries that no encoder writes")
    return flat


def encode_hello(hello: Hello) -> RecordDict:
    """Return the content of the answer to ``hello``."""
    config = ConfigRecord(
        {
            "protocol": PROTOCOL,
            "clients": list(hello.clients),
            "groups": list(hello.groups),
            "form": hello.form,
            "manifest": hello.manifest.to_json(),
            "versions": json.dumps(dict(hello.versions), sort_keys=True),
        }
    )
    counts: dict[str, list[int]] = {
        "train": list(hello.train),
        "validation": list(hello.validation),
        "test": list(hello.test),
        "size": list(hello.size),
    }
    return RecordDict({"hello": config, "counts": MetricRecord(counts)})  # type: ignore[arg-type]


def decode_hello(content: RecordDict) -> Hello:
    """Read and check the answer to ``hello``.

    A node that does not take part answers by ``encode_failure`` with its one client and a status
    code: that code is the reason of the ``WireError``.  Without a client it is ``could-not-start``.
    """
    if "hello" not in content.config_records and "status" in content.metric_records:
        raise WireError(_refusal(content))
    try:
        c = content.config_records["hello"]
        m = content.metric_records["counts"]
        if int(c["protocol"]) != PROTOCOL:  # type: ignore[arg-type]
            raise WireError("protocol")
        clients = tuple(name(x) for x in c["clients"])  # type: ignore[union-attr]
        counts = {n: ints(m[n], len(clients)) for n in ("train", "validation", "test", "size")}
        hello = Hello(
            clients=clients,
            groups=tuple(name(x) for x in c["groups"]),  # type: ignore[union-attr]
            form=str(c["form"]),
            manifest=Manifest.from_json(str(c["manifest"])),
            versions={str(k): str(v) for k, v in json.loads(str(c["versions"])).items()},
            **counts,
        )
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError, RecursionError):
        raise WireError("bad-hello") from None
    if len(hello.groups) != len(clients) or len(set(clients)) != len(clients):
        raise WireError("bad-hello", "groups or names do not match the clients")
    if len(clients) > MAX_CLIENTS or hello.form not in ("survey", "pairs"):
        raise WireError("bad-hello", "too many clients or unknown data form")
    return hello


def _refusal(content: RecordDict) -> str:
    """Return why a node does not take part, as one of the codes of ``STATUS``."""
    try:
        if int(content.config_records["reply"]["protocol"]) != PROTOCOL:  # type: ignore[arg-type]
            return "protocol"
        given = content.metric_records["status"]["status"]
        if not given:
            return "could-not-start"
        (status,) = ints(given, 1)
    except (KeyError, TypeError, ValueError, OverflowError):
        return "bad-hello"
    return STATUS[status] if status in STATUS and status != OK else "bad-hello"
