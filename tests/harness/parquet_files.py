"""Small Parquet files of images."""

from __future__ import annotations

import base64
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pyarrow.parquet.encryption as pe


def image_struct(images: Sequence[tuple[bytes | None, str | None] | None]) -> pa.Array:
    """Images as Hugging Face's datasets store them."""
    kind = pa.struct({"bytes": pa.binary(), "path": pa.string()})
    return pa.array([None if each is None else {"bytes": each[0], "path": each[1]} for each in images], kind)


def class_label(column: str, names: object) -> dict[bytes, bytes]:
    """The metadata that names the classes of a column."""
    features = {"image": {"_type": "Image"}, column: {"names": names, "_type": "ClassLabel"}}
    return {b"huggingface": json.dumps({"info": {"features": features}}).encode()}


def write_table(
    path: Path, columns: dict[str, Any], metadata: dict[bytes, bytes] | None = None, **options: Any
) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns).replace_schema_metadata(metadata), path, **options)
    return path


class _Keys(pe.KmsClient):
    """A key server that hides nothing."""

    def wrap_key(self, key: bytes, name: str) -> str:
        return base64.b64encode(key).decode()

    def unwrap_key(self, wrapped: str, name: str) -> bytes:
        return base64.b64decode(wrapped)


def write_encrypted(path: Path, columns: dict[str, Any], plaintext_footer: bool) -> Path:
    factory = pe.CryptoFactory(lambda _: _Keys())
    settings = pe.EncryptionConfiguration("footer", column_keys={"key": ["image"]}, plaintext_footer=plaintext_footer)
    properties = factory.file_encryption_properties(pe.KmsConnectionConfig(), settings)
    pq.write_table(pa.table(columns), path, encryption_properties=properties)
    return path
