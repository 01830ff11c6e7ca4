"""What /openapi.json says beyond what FastAPI derives from the routes."""

from __future__ import annotations

from typing import Any

from odise_rt.serve.fields import FIELDS, IMAGE
from odise_rt.serve.limits import Limits
from odise_rt.serve.problems import RETRYABLE, STATUS

DESCRIPTION = """Open-vocabulary panoptic segmentation: an image and words in, named segments out.

    curl -F image=@photo.jpg --form-string vocabulary='black pickup truck, pickup truck; stuff: sky' HOST/v1/segment
    curl -F image=@photo.jpg -F vocabulary_name=coco -F format=overlay HOST/v1/segment -o overlay.png
    curl --data-binary @photo.jpg -H 'Content-Type: image/jpeg' 'HOST/v1/segment?vocabulary_name=coco'

Every problem has one form, `{"error": {"type", "status", "message", "retryable", "request_id"}}`. When `retryable` is
true the same request may succeed later; `Retry-After` says when, where that is known.
"""

_SEGMENT_EXAMPLE = {
    "height": 480,
    "width": 640,
    "segments": [
        {
            "id": 1,
            "label": "black pickup truck",
            "class_index": 0,
            "score": 0.83,
            "area": 51234,
            "box": [12, 200, 390, 460],
            "isthing": True,
            "rle": {"size": [480, 640], "counts": "…"},
        }
    ],
    "facts": {"device": "cpu", "windows": 1, "seconds": {"total": 1.4}},
}


def complete(generated: dict[str, Any]) -> None:
    """Add the form of problems to what FastAPI generated, and take out its own, which this server never sends."""
    schemas = generated.setdefault("components", {}).setdefault("schemas", {})
    for name in ("HTTPValidationError", "ValidationError"):
        schemas.pop(name, None)
    for path in generated["paths"].values():
        for operation in path.values():
            if "HTTPValidationError" in str(operation["responses"].get("422", "")):
                del operation["responses"]["422"]
    schemas["Error"] = _error_schema()


def _error_schema() -> dict[str, Any]:
    error = {
        "type": "object",
        "required": ["type", "status", "message", "retryable"],
        "properties": {
            "type": {"type": "string", "enum": list(STATUS), "description": "For programs; names are kept."},
            "status": {"type": "integer", "description": "The HTTP status."},
            "message": {"type": "string", "description": "For people: what came, what was expected, what to do."},
            "retryable": {"type": "boolean", "description": "Whether the same request may succeed later."},
            "request_id": {"type": "string", "description": "Also in the header X-Request-Id and in the log."},
        },
    }
    return {"type": "object", "required": ["error"], "properties": {"error": error}}


def problem_responses(*types: str) -> dict[int | str, dict[str, Any]]:
    """``responses`` of a route for some types of problems."""
    by_status: dict[int, list[str]] = {}
    for kind in types:
        by_status.setdefault(STATUS[kind], []).append(kind)
    responses: dict[int | str, dict[str, Any]] = {}
    for status, kinds in sorted(by_status.items()):
        examples = {
            kind: {"value": {"error": {"type": kind, "status": status, "message": "…", "retryable": kind in RETRYABLE}}}
            for kind in kinds
        }
        content = {"schema": {"$ref": "#/components/schemas/Error"}, "examples": examples}
        responses[status] = {"description": ", ".join(kinds), "content": {"application/json": content}}
        if any(kind in RETRYABLE for kind in kinds):
            responses[status]["headers"] = {
                "Retry-After": {"schema": {"type": "integer"}, "description": "Seconds; where known."}
            }
    return responses


def segment_operation(limits: Limits) -> dict[str, Any]:
    """Request body and parameters of POST /v1/segment."""
    fields = {name: field.schema | {"description": field.description} for name, field in FIELDS.items()}
    image = {
        "type": "string",
        "format": "binary",
        "description": "JPEG, PNG, WebP, AVIF, TIFF, GIF, BMP, PPM or JPEG 2000; at most "
        f"{limits.max_pixels:,} pixels.",
    }
    form = {"type": "object", "required": [IMAGE], "properties": {IMAGE: image, **fields}}
    raw = {"schema": {"type": "string", "format": "binary"}}
    return {
        "requestBody": {
            "required": True,
            "description": f"At most {limits.max_request_bytes:,} bytes. With a raw body the other fields go into the "
            "query.",
            "content": {"multipart/form-data": {"schema": form}, "image/*": raw, "application/octet-stream": raw},
        },
        "parameters": [
            {
                "name": name,
                "in": "query",
                "required": False,
                "description": field.description,
                "schema": {k: v for k, v in field.schema.items() if k != "example"},
            }
            for name, field in FIELDS.items()
        ],
    }


def segment_responses() -> dict[int | str, dict[str, Any]]:
    """``responses`` of POST /v1/segment."""
    success = {
        "description": "The result in the format asked for.",
        "content": {
            "application/json": {"schema": {"type": "object"}, "example": _SEGMENT_EXAMPLE},
            "image/png": {"schema": {"type": "string", "format": "binary"}},
        },
    }
    elsewhere = ("not_found", "method_not_allowed")
    return {200: success, **problem_responses(*(kind for kind in STATUS if kind not in elsewhere))}
