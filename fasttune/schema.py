"""JSON schema of the config for editors, and the documentation of each key.

`fasttune schema` prints it; configs/fasttune.schema.json is its committed output. An editor with
TOML support (taplo, Even Better TOML) reads it through the line `#:schema fasttune.schema.json`.
"""

import ast
import json
from collections.abc import Mapping
from dataclasses import MISSING, fields
from functools import cache
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from fasttune import config as config_module
from fasttune.config_checks import BOUNDS, Bound
from fasttune.config_file import key_types, section_types
from fasttune.config_values import NONE_TEXT, is_union


@cache
def field_docs() -> dict[str, str]:
    """Docstrings from the source of config.py: "section.key" -> that of the field, "section" ->
    that of its class, each as one line of text."""
    classes = {cls.__name__: section for section, cls in section_types().items()}
    docs = {}
    tree = ast.parse(Path(config_module.__file__).read_text(encoding="utf-8"))
    for node in tree.body:
        if not isinstance(node, ast.ClassDef) or node.name not in classes:
            continue
        section = classes[node.name]
        docs[section] = _one_line(ast.get_docstring(node) or "")
        for statement, following in zip(node.body, node.body[1:], strict=False):
            if (
                isinstance(statement, ast.AnnAssign)
                and isinstance(statement.target, ast.Name)
                and isinstance(following, ast.Expr)
                and isinstance(following.value, ast.Constant)
            ):
                docs[f"{section}.{statement.target.id}"] = _one_line(str(following.value.value))
    return docs


def _one_line(text: str) -> str:
    return " ".join(text.split())


def json_schema() -> dict[str, Any]:
    """The schema, draft 2020-12: types, choices, bounds, defaults and descriptions of every key.

    Clashes between keys are left to `load_config`.
    """
    properties: dict[str, Any] = {}
    for name in section_types():
        section = _section_schema(name)
        if name == "data":
            section = {"type": "array", "minItems": 1, "items": section}
        properties[name] = section
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "fasttune config",
        "type": "object",
        "additionalProperties": False,
        "required": ["model", "data"],
        "properties": properties,
    }


def schema_text() -> str:
    """The schema as the committed file has it."""
    return json.dumps(json_schema(), indent=2, ensure_ascii=False) + "\n"


def _section_schema(name: str) -> dict[str, Any]:
    cls = section_types()[name]
    properties, required = {}, []
    for info in fields(cls):
        dotted = f"{name}.{info.name}"
        entry = {"description": field_docs()[dotted]}
        entry |= _type_schema(key_types()[dotted], BOUNDS.get(dotted))
        if info.default is MISSING:
            required.append(info.name)
        else:
            entry["default"] = _plain(info.default)
        properties[info.name] = entry
    schema = {
        "description": field_docs()[name],
        "type": "object",
        "additionalProperties": False,
        "properties": properties,
    }
    return schema | {"required": required} if required else schema


def _plain(value: Any) -> Any:
    if value is None:
        return NONE_TEXT
    return list(value) if isinstance(value, tuple) else value


def _type_schema(hint: Any, bound: Bound | None) -> dict[str, Any]:
    if hint is type(None):
        return {"const": NONE_TEXT}
    if is_union(hint):
        options = [option for option in get_args(hint) if option is not type(None)]
        # "none" is a string too: listed beside a plain string it would say nothing.
        if len(options) < len(get_args(hint)) and str not in options:
            options.append(type(None))
        schemas = [_type_schema(option, bound) for option in options]
        return schemas[0] if len(schemas) == 1 else {"anyOf": schemas}
    origin, items = get_origin(hint), get_args(hint)
    if origin is Literal:
        return {"enum": list(items)}
    if origin is Mapping:
        names, values = (_type_schema(item, bound) for item in items)
        return {"type": "object", "propertyNames": names, "additionalProperties": values}
    if origin is tuple:
        schema: dict[str, Any] = {"type": "array", "items": _type_schema(items[0], bound)}
        if items[-1] is not Ellipsis:
            schema |= {"minItems": len(items), "maxItems": len(items)}
        return schema
    kind = {str: "string", int: "integer", float: "number", bool: "boolean"}[hint]
    limits = {} if bound is None or kind not in ("integer", "number") else _limits(bound)
    return {"type": kind} | limits


def _limits(bound: Bound) -> dict[str, float]:
    limits = {
        "minimum": bound.minimum,
        "maximum": bound.maximum,
        "exclusiveMinimum": bound.above,
        "exclusiveMaximum": bound.below,
    }
    return {key: limit for key, limit in limits.items() if limit is not None}
