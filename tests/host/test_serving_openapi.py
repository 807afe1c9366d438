"""The API against its own description: what it says of itself is what it does, for requests drawn from it too."""

import asyncio
import json

import httpx2
import jsonschema
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from serving_doubles import site

from zinfer.config.schema import Serve
from zinfer.serving.openapi import description

DOCUMENT = description(Serve())
POSTS = [path for path, item in DOCUMENT["paths"].items() if "post" in item]
GETS = [path for path, item in DOCUMENT["paths"].items() if "get" in item]
JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-3, 3)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=6,
)


def whole(schema):
    """A schema that stands alone: references become the definitions they name."""
    if isinstance(schema, dict):
        if "$ref" in schema:
            return whole(DOCUMENT["components"]["schemas"][schema["$ref"].rsplit("/", 1)[1]])
        return {key: whole(value) for key, value in schema.items()}
    return [whole(value) for value in schema] if isinstance(schema, list) else schema


def body_schema(path):
    return whole(DOCUMENT["paths"][path]["post"]["requestBody"]["content"]["application/json"]["schema"])


def from_schema(schema):
    """Values that fit: of what pydantic writes, and no more; an unknown keyword fails aloud."""
    known = {"type", "properties", "required", "additionalProperties", "items", "minItems", "maxItems"}
    known |= {"anyOf", "enum", "minimum", "default", "title", "description"}
    assert set(schema) <= known, schema
    if "anyOf" in schema:
        return st.one_of([from_schema(one) for one in schema["anyOf"]])
    if "enum" in schema:
        return st.sampled_from(schema["enum"])
    match schema["type"]:
        case "object":
            fields = {name: from_schema(one) for name, one in schema["properties"].items()}
            needed = {name: fields.pop(name) for name in schema["required"]}
            return st.fixed_dictionaries(needed, optional=fields)
        case "array":
            least, most = schema.get("minItems", 0), schema.get("maxItems", 4)
            return st.lists(from_schema(schema["items"]), min_size=least, max_size=most)
        case "string":
            return st.text(max_size=12)
        case "integer":
            return st.integers(schema.get("minimum", -9), 99)
        case "boolean":
            return st.booleans()
    assert schema["type"] == "null", schema
    return st.none()


def is_valid(schema, value):
    return jsonschema.Draft202012Validator(schema).is_valid(value)


@pytest.fixture(scope="module")
def ask():
    """ask(method, path, content) -> response, of a server that answers everything at once."""
    with site(max_texts=64) as here, asyncio.Runner() as runner:
        client = here.client(**{"content-type": "application/json"})
        yield lambda method, path, content=None: runner.run(client.request(method, path, content=content))
        runner.run(client.aclose())


def check_response(path, method, found):
    """Its status is described, and its body and headers are as described."""
    responses = DOCUMENT["paths"][path][method]["responses"]
    assert str(found.status_code) in responses
    described = responses[str(found.status_code)]
    for name in described.get("headers", {}):
        assert int(found.headers[name]) >= 1
    ((kind, content),) = described["content"].items()
    assert found.headers["content-type"].startswith(kind)
    value = found.json() if kind == "application/json" else found.text
    jsonschema.validate(value, whole(content["schema"]), jsonschema.Draft202012Validator)


def test_routes_and_description_are_the_same_set():
    with site() as here:
        routes = {
            (route.path, method) for route in here.app.app.routes for method in route.methods - {"HEAD"}
        }
    described = {(path, method.upper()) for path, item in DOCUMENT["paths"].items() for method in item}
    assert routes == described


def test_every_schema_is_a_schema_and_no_reference_leads_nowhere():
    for schema in DOCUMENT["components"]["schemas"].values():
        jsonschema.Draft202012Validator.check_schema(whole(schema))
    for path in POSTS:
        assert "$ref" not in json.dumps(body_schema(path))


def test_keys_stand_in_it_where_they_are_asked_for():
    assert "securitySchemes" not in DOCUMENT["components"]
    keyed = description(Serve(api_key="k"))
    secured = {path for path, item in keyed["paths"].items() for one in item.values() if "security" in one}
    assert secured == set(keyed["paths"]) - {"/health"}
    assert "401" in keyed["paths"]["/predict"]["post"]["responses"]


@pytest.mark.parametrize("path", GETS)
def test_gets_are_as_described(ask, path):
    check_response(path, "get", ask("GET", path))


@pytest.mark.parametrize("path", POSTS)
def test_what_fits_the_description_is_answered(ask, path):
    @given(from_schema(body_schema(path)))
    @settings(max_examples=60)
    def fits(body):
        found = ask("POST", path, json.dumps(body).encode())
        check_response(path, "post", found)
        assert found.status_code == 200 or (found.status_code, body.get("truncate")) == (413, False), (
            found.text
        )

    fits()


@pytest.mark.parametrize("path", POSTS)
def test_what_does_not_fit_is_refused_and_nothing_else_is(ask, path):
    """One field of a body that fits is taken away, renamed or replaced by anything: schema and server agree."""

    @given(from_schema(body_schema(path)), st.data())
    @settings(max_examples=100)
    def agrees(body, data):
        name = data.draw(st.sampled_from([*body, "truncate", "top_k", "normalize", "raw_scores"]))
        kept = {key: value for key, value in body.items() if key != name}
        changed = data.draw(
            st.sampled_from([kept, kept | {name + "s": body.get(name)}])
            | JSON.map(lambda value: kept | {name: value})
        )
        found = ask("POST", path, json.dumps(changed).encode())
        check_response(path, "post", found)
        assert (found.status_code == 422) == (not is_valid(body_schema(path), changed)), found.text

    agrees()


@pytest.mark.parametrize("path", POSTS)
@given(body=JSON | st.binary(max_size=16))
def test_anything_at_all_has_a_described_status(ask, path, body):
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    check_response(path, "post", ask("POST", path, content))


@given(
    method=st.sampled_from(["GET", "POST", "PUT", "DELETE", "OPTIONS", "HEAD", "PATCH"]),
    path=st.text(st.characters(codec="ascii", categories=("L", "N", "P")), max_size=8),
)
def test_every_other_path_and_method_is_404_or_405(ask, method, path):
    try:
        found = ask(method, "/" + path)
    except httpx2.InvalidURL:
        return
    if "/" + path not in DOCUMENT["paths"]:
        assert found.status_code in (404, 405)


def test_the_differential_test_can_fail(ask):
    """Mutation: a server whose schema forgot that texts must not be empty."""
    lax = body_schema("/embed")
    for form in lax["anyOf"]:
        form["properties"].get("texts", {}).pop("minItems", None)
    assert is_valid(lax, {"texts": []})
    assert not is_valid(body_schema("/embed"), {"texts": []})
    assert ask("POST", "/embed", b'{"texts": []}').status_code == 422
