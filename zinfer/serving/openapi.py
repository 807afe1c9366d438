"""The API in its own words.  In: limits.  Out: an OpenAPI 3.1 document, whose schemas are what checks requests."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeAlias

from pydantic.json_schema import models_json_schema

from zinfer import __version__
from zinfer.config.schema import Serve
from zinfer.serving.asks import FORMS, Kind
from zinfer.serving.refusal import ERROR_TYPES

Tree: TypeAlias = dict[str, Any]
_REF = "#/components/schemas/"
_LABEL = {
    "type": "object",
    "required": ["label", "score"],
    "properties": {"label": {"type": "string"}, "score": {"type": "number"}},
    "additionalProperties": False,
}
_LABELS = {"type": "array", "items": {"$ref": f"{_REF}Label"}, "minItems": 1}
_VECTOR = {"type": "array", "items": {"type": "number"}, "minItems": 1}
_WHO = {
    "students": {"type": "integer", "minimum": 1, "description": "how many answered this text"},
    "deferred": {"type": "boolean", "description": "whether the teacher answered"},
    "tokens": {"type": "integer", "minimum": 1},
    "truncated": {"type": "boolean", "description": "whether it was longer than the model takes, and cut"},
}
_ERROR = {
    "type": "object",
    "required": ["code", "message", "remedy", "error", "error_type"],
    "properties": {
        "code": {"type": "string", "pattern": r"^ZI-\d{4}$"},
        "message": {"type": "string", "description": "what was wanted and what was there"},
        "remedy": {"type": "string", "description": "what to try"},
        "error": {"type": "string", "description": "the message, where TEI has it"},
        "error_type": {"enum": list(ERROR_TYPES)},
        "retry_after_s": {"type": "number", "minimum": 0},
    },
    "additionalProperties": False,
}
_REFUSALS = {
    "400": "not JSON",
    "408": "the body did not arrive in time",
    "413": "too many bytes, texts, characters or tokens",
    "415": "not application/json",
    "422": "JSON of another shape, or a text that has no token",
    "424": "a model without a head was asked to predict, or a pass failed",
    "429": "the queue is full; Retry-After says when there should be room",
    "503": "loading, or ending",
}


def description(limits: Serve) -> Tree:
    """The document.  401 and the scheme stand in it where a key is set."""
    document: Tree = {
        "openapi": "3.1.0",
        "info": {"title": "zinfer serve", "version": __version__},
        "paths": {
            "/predict": {"post": _post("predict", "Labels with scores, likeliest first.")},
            "/embed": {"post": _post("embed", "Vectors.")},
            "/health": {"get": _get("The process lives.", "application/json")},
            "/ready": {"get": _get("A request would be taken.", "application/json", {"503": "not now"})},
            "/info": {"get": _get("The model, and the limits of this server.", "application/json")},
            "/metrics": {"get": _get("Prometheus text, version 0.0.4.", "text/plain")},
            "/openapi.json": {"get": _get("This document.", "application/json")},
        },
        "components": {"schemas": _schemas()},
    }
    if limits.api_key is not None:
        document["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
        for path, item in document["paths"].items():
            for operation in item.values():
                if path != "/health":
                    operation["security"] = [{"key": []}]
                    operation["responses"]["401"] = _refusal("no key, or another one")
    return document


def _post(kind: Kind, summary: str) -> Tree:
    forms = [{"$ref": _REF + form.__name__} for form in FORMS[kind]]
    answer = {"$ref": f"{_REF}{kind.capitalize()}Answer"}
    responses = {code: _refusal(why) for code, why in _REFUSALS.items()}
    students = {"schema": {"type": "integer", "minimum": 1}, "description": "the fewest that answered a text"}
    responses["200"] = {
        "description": summary,
        "headers": {"x-students": students},
        "content": {"application/json": {"schema": answer}},
    }
    for code in ("429", "503"):
        responses[code]["headers"] = {"retry-after": {"schema": {"type": "integer", "minimum": 1}}}
    body = {"required": True, "content": {"application/json": {"schema": {"anyOf": forms}}}}
    return {"summary": summary, "operationId": kind, "requestBody": body, "responses": responses}


def _get(summary: str, media_type: str, refusals: Mapping[str, str] | None = None) -> Tree:
    schema = {"type": "object"} if media_type == "application/json" else {"type": "string"}
    found: Tree = {"200": {"description": summary, "content": {media_type: {"schema": schema}}}}
    found |= {code: _refusal(why) for code, why in (refusals or {}).items()}
    return {"summary": summary, "responses": found}


def _refusal(why: str) -> Tree:
    return {"description": why, "content": {"application/json": {"schema": {"$ref": f"{_REF}Error"}}}}


def _schemas() -> Tree:
    forms = [form for pair in FORMS.values() for form in pair]
    _, found = models_json_schema([(form, "validation") for form in forms], ref_template=_REF + "{model}")
    schemas: Tree = dict(found["$defs"])
    for kind, result in (("Predict", {"labels": _LABELS}), ("Embed", {"embedding": _VECTOR})):
        schemas[f"{kind}Plain"] = _plain(result)
    labels_or_more = [_LABELS, {"type": "array", "items": _LABELS}, {"$ref": f"{_REF}PredictPlain"}]
    schemas["PredictAnswer"] = {"anyOf": labels_or_more}
    schemas["EmbedAnswer"] = {"anyOf": [{"type": "array", "items": _VECTOR}, {"$ref": f"{_REF}EmbedPlain"}]}
    return schemas | {"Label": _LABEL, "Error": _ERROR}


def _plain(result: Tree) -> Tree:
    fields = result | _WHO
    row = {"type": "object", "required": list(fields), "properties": fields, "additionalProperties": False}
    count = {"type": "integer", "minimum": 1}
    return {
        "type": "object",
        "required": ["results", "students", "of"],
        "properties": {"results": {"type": "array", "items": row}, "students": count, "of": count},
        "additionalProperties": False,
    }
