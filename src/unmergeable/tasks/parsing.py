"""Fields of a configuration, checked by pydantic, with every problem told at once and in this package's words."""

from __future__ import annotations

from collections.abc import Mapping
from difflib import get_close_matches
from types import UnionType
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from ..checkpoint.problems import Problems

Model = TypeVar("Model", bound=BaseModel)

# pydantic's type of error -> what would have been right; braces are filled from the error's context.
_EXPECTED = {
    "string_type": "text",
    "int_type": "a whole number",
    "int_parsing": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "float_parsing": "a number",
    "finite_number": "a finite number",
    "bool_type": "true or false",
    "bool_parsing": "true or false",
    "list_type": "a list",
    "tuple_type": "a list",
    "dict_type": "names with values",
    "model_type": "fields with values",
    "model_attributes_type": "fields with values",
    "path_type": "a path",
    "greater_than": "more than {gt}",
    "greater_than_equal": "at least {ge}",
    "less_than": "less than {lt}",
    "less_than_equal": "at most {le}",
    "too_short": "at least {min_length} of them",
    "too_long": "at most {max_length} of them",
    "string_too_short": "text of at least {min_length} characters",
    "string_too_long": "text of at most {max_length} characters",
    "string_pattern_mismatch": "text of the form {pattern}",
    "literal_error": "{expected}",
    "enum": "{expected}",
    "union_tag_invalid": "{expected_tags}",
}


def parse_fields(model: type[Model], data: Mapping[str, Any], where: str) -> Model:
    """Read fields into a model.

    Args:
        model: what fields there are; unknown ones are errors if it forbids extras.
        data: the fields, as a YAML or JSON document has them.
        where: what they are from, for messages: the name of a file or of a task.

    Raises:
        InputError: whatever is wrong with them, all of it, each with the path of its field.
    """
    problems = Problems(where)
    found = try_fields(model, data, where, problems)
    problems.raise_any()
    assert found is not None  # pydantic names at least one error, and each of them becomes a problem
    return found


def try_fields(model: type[Model], data: Mapping[str, Any], where: str, problems: Problems) -> Model | None:
    """As `parse_fields`, but what is wrong is noted: None then."""
    try:
        return model.model_validate(dict(data))
    except ValidationError as error:
        _complain(model, error, where, problems)
        return None


def _complain(model: type[BaseModel], error: ValidationError, where: str, problems: Problems) -> None:
    """Note every error."""
    found: dict[str, list[tuple[Any, Any]]] = {}
    for one in error.errors(include_url=False):
        place = _Place(model, one["loc"])
        path = place.path
        if one["type"] in ("union_tag_invalid", "union_tag_not_found"):
            path += ("." if path else "") + str(one["ctx"]["discriminator"]).strip("'")
        found.setdefault(path, []).append((one, place))
    for path, several in found.items():
        if any(other.startswith((f"{path}.", f"{path}[")) for other in found if path):
            continue  # another form that the field can have: the problem is further in
        problems.add(where=f"{where}: {path}" if path else where, **_told(several))


def _told(several: list[tuple[Any, Any]]) -> dict[str, Any]:
    """What is said of one field, for `Problems.add`; several errors are of the forms that it can have."""
    one, place = several[0]
    kind, context = one["type"], one.get("ctx", {})
    if kind in ("missing", "union_tag_not_found"):
        return {"what": "a field is missing", "expected": place.tags or None}
    if kind in ("extra_forbidden", "invalid_key"):
        known = list(place.owner.model_fields) if place.owner is not None else []
        near = get_close_matches(str(one["loc"][-1]), known, n=3)
        return {"what": "no such field", "expected": " | ".join(near or known) or None}
    if kind == "value_error":
        return {"what": str(context["error"]), "got": _short(one["input"])}
    expected = []
    for each, at in several:
        text = _EXPECTED.get(each["type"], each["msg"][:1].lower() + each["msg"][1:])
        if each["type"] == "string_pattern_mismatch" and at.examples:
            text = "text like " + " or ".join(map(repr, at.examples))
        elif each["type"] in ("literal_error", "union_tag_invalid"):
            text = place.tags or place.choices or text
        filled = text.format(**each.get("ctx", {})) if each["type"] in _EXPECTED else text
        if filled not in expected:
            expected.append(filled)
    got = context["tag"] if kind == "union_tag_invalid" else one["input"]
    return {"what": "not a value of this field", "expected": " or ".join(expected), "got": _short(got)}


def _short(value: Any) -> str:
    text = ascii(value)
    return text if len(text) <= 80 else f"{text[:80]}…"


class _Place:
    """Where an error is: pydantic's location without the labels that it puts in for forms of a union.

    Attributes:
        path: as a reader would write it, `tasks.one.mean[2]`.
        owner: the model that the last field is of; None if it is in none.
        tags, choices: what the discriminator, or the field itself, may be, joined by bars.
        examples: of the field.
    """

    def __init__(self, model: type[BaseModel], location: tuple[int | str, ...]) -> None:
        self.path = ""
        self.owner: type[BaseModel] | None = None
        self.tags = self.choices = ""
        self.examples: list[Any] = []
        kind: Any = model
        for step in location:
            forms = _forms(kind)
            if len(forms) > 1:  # the step may be a label, and is none of a field's
                chosen = [form for form in forms if step in _labels(form)]
                if chosen or isinstance(step, str):
                    kind = chosen[0] if chosen else None
                    continue
            kind = self._enter(forms[0] if forms else None, step)
        forms = _forms(kind)
        self.tags = " | ".join(tag for form in forms for tag in _tags(form)) if len(forms) > 1 else ""
        self.choices = " | ".join(str(value) for form in forms for value in _literals(form))

    def _enter(self, kind: Any, step: int | str) -> Any:
        """Takes a step into a field or an item; returns what is expected there."""
        if isinstance(step, int):
            self.path += f"[{step}]"
            return get_args(kind)[0] if get_args(kind) else None
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            self.owner = kind
            self.path += ("." if self.path else "") + step
            field: FieldInfo | None = kind.model_fields.get(step)
            self.examples = list(field.examples or ()) if field is not None else []
            return field.annotation if field is not None else None
        if get_origin(kind) in (dict, Mapping):
            if step != "[key]":
                self.path += ("." if self.path else "") + step
            return get_args(kind)[1]
        return None  # a label of pydantic's own, such as "float"


def _forms(kind: Any) -> list[Any]:
    """What a value may be: the members of a union but None, or the type itself."""
    while get_origin(kind) is Annotated:
        kind = get_args(kind)[0]
    if get_origin(kind) in (Union, UnionType):
        return [form for member in get_args(kind) if member is not type(None) for form in _forms(member)]
    return [] if kind is None else [kind]


def _labels(form: Any) -> set[Any]:
    """What pydantic calls a member of a union in a location: its tag, or its name."""
    return {*_tags(form), getattr(form, "__name__", None), str(form)}


def _tags(form: Any) -> list[str]:
    """The values of the fields of a model that can have but one: its discriminator."""
    if not (isinstance(form, type) and issubclass(form, BaseModel)):
        return []
    single = [_literals(field.annotation) for field in form.model_fields.values()]
    return [str(values[0]) for values in single if len(values) == 1]


def _literals(kind: Any) -> tuple[Any, ...]:
    return get_args(kind) if get_origin(kind) is Literal else ()
