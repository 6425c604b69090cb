"""Whether a JSON value has the form that a JSON schema asks for.

The part of JSON Schema 2020-12 that `certificate.schema.json` uses, and no more: a certificate is
looked at by whoever got one, who needs no further package for that. A schema that uses another
word is an error.
"""

import re
from collections.abc import Iterator, Mapping
from typing import Any

_KNOWN = {
    "$schema", "title", "description", "$defs", "$ref", "type", "const", "enum", "anyOf",
    "required", "properties", "additionalProperties", "items", "minItems", "minimum", "maximum",
    "exclusiveMinimum", "exclusiveMaximum", "pattern",
}  # fmt: skip
_KINDS: Mapping[str, type | tuple[type, ...]] = {
    "object": dict,
    "array": list,
    "string": str,
    "integer": int,
    "number": (int, float),
    "boolean": bool,
    "null": type(None),
}


def faults(value: Any, schema: Mapping[str, Any]) -> Iterator[str]:
    """What is wrong with a value, one sentence a place.

    Args:
        value: as JSON gives it.
        schema: the whole schema; its `$ref`s point into its own `$defs`.
    """
    yield from _faults(value, schema, schema, "")


def _faults(
    value: Any, schema: Mapping[str, Any], root: Mapping[str, Any], where: str
) -> Iterator[str]:
    unknown = schema.keys() - _KNOWN
    if unknown:
        raise ValueError(f"the schema says {sorted(unknown)}, which is not understood here")
    if "$ref" in schema:
        schema = root["$defs"][schema["$ref"].removeprefix("#/$defs/")]
    place = where or "it"
    if "anyOf" in schema:
        branches = [list(_faults(value, branch, root, where)) for branch in schema["anyOf"]]
        if all(branches):
            yield min(branches, key=len)[0]
        return
    if "const" in schema and not _same(value, schema["const"]):
        yield f"{place} is {_short(value)} where {schema['const']!r} belongs"
        return
    if "enum" in schema and not any(_same(value, each) for each in schema["enum"]):
        yield f"{place} is {_short(value)}, which is none of {', '.join(schema['enum'])}"
        return
    if "type" in schema and not _is(value, schema["type"]):
        yield f"{place} is {_short(value)} where a JSON {schema['type']} belongs"
        return
    if isinstance(value, dict):
        yield from _object(value, schema, root, where)
    elif isinstance(value, list):
        if len(value) < schema.get("minItems", 0):
            yield f"{place} has {len(value)} entries, fewer than {schema['minItems']}"
        for number, part in enumerate(value):
            yield from _faults(part, schema.get("items", {}), root, f"{where}[{number}]")
    elif isinstance(value, str) and not re.search(schema.get("pattern", ""), value):
        yield f"{place} is {_short(value)}, which is not of the form {schema['pattern']}"
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield from _number(value, schema, place)


def _object(
    value: Mapping[str, Any], schema: Mapping[str, Any], root: Mapping[str, Any], where: str
) -> Iterator[str]:
    for name in schema.get("required", ()):
        if name not in value:
            yield f"{f'{where}.{name}'.lstrip('.')} is missing"
    known, rest = schema.get("properties", {}), schema.get("additionalProperties", True)
    for name, part in value.items():
        inner = known.get(name, rest)
        if inner is False:
            yield f"{f'{where}.{name}'.lstrip('.')} is not known in this format"
        elif inner is not True:
            yield from _faults(part, inner, root, f"{where}.{name}".lstrip("."))


def _number(value: float, schema: Mapping[str, Any], place: str) -> Iterator[str]:
    if "minimum" in schema and value < schema["minimum"]:
        yield f"{place} is {value}, below {schema['minimum']}"
    if "maximum" in schema and value > schema["maximum"]:
        yield f"{place} is {value}, above {schema['maximum']}"
    if "exclusiveMinimum" in schema and value <= schema["exclusiveMinimum"]:
        yield f"{place} is {value}, not above {schema['exclusiveMinimum']}"
    if "exclusiveMaximum" in schema and value >= schema["exclusiveMaximum"]:
        yield f"{place} is {value}, not below {schema['exclusiveMaximum']}"


def _is(value: Any, kind: str) -> bool:
    if isinstance(value, bool) and kind != "boolean":
        return False
    if kind == "integer" and isinstance(value, float):
        return value.is_integer()
    return isinstance(value, _KINDS[kind])


def _same(value: Any, other: Any) -> bool:
    return isinstance(value, bool) == isinstance(other, bool) and bool(value == other)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
