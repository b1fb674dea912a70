"""What a request asks for: JSON objects, and forms with a picture."""

from typing import Any

from aiohttp import web

from pikastream_jax.live.hub import Refused, Wanted


async def asked(request: web.Request) -> tuple[dict[str, Any], bytes | None]:
    """What a JSON object or a form says, and the picture that came with a form.

    Raises:
      Refused: it is neither.
    """
    if request.content_type == "application/json":
        try:
            fields = await request.json()
        except ValueError as error:
            raise Refused(400, f"the body is no JSON: {error}") from error
        if not isinstance(fields, dict):
            raise Refused(400, f"the body is a JSON {type(fields).__name__}: send an object")
        return fields, None
    if request.content_type != "multipart/form-data":
        raise Refused(415, f"the body is {request.content_type}: send application/json, or multipart/form-data with an image")
    try:
        form = await request.post()
    except ValueError as error:
        raise Refused(400, f"the form cannot be read: {error}") from error
    image = form.get("image")
    fields = {name: value for name, value in form.items() if name != "image"}
    if image is not None and not isinstance(image, web.FileField):
        raise Refused(422, "image is text: send it as a file")
    for name, value in fields.items():
        if not isinstance(value, str):
            raise Refused(422, f"{name} is a file: send text")
    return fields, image.file.read() if image is not None else None


def known(fields: dict[str, Any], names: tuple[str, ...]) -> None:
    """Raises Refused where there is a field of another name."""
    if unknown := sorted(set(fields) - set(names)):
        raise Refused(422, f"unknown field {', '.join(unknown)}: there are {', '.join(names)}")


def consent(fields: dict[str, Any]) -> bool:
    """Whether it is said that the person shown agrees."""
    return fields.get("consent") in (True, "true")


def avatar_name(fields: dict[str, Any]) -> str | None:
    """The face of the gallery that is asked for. Raises Refused where it is no text."""
    avatar = fields.get("avatar")
    if avatar is not None and not isinstance(avatar, str):
        raise Refused(422, f"avatar is {type(avatar).__name__}: send a name")
    return avatar or None


def whole_number(value: Any, name: str) -> int:
    """Raises Refused where it is none."""
    try:
        return int(value)
    except (TypeError, ValueError, OverflowError) as error:
        raise Refused(422, f"{name} {value!r} is no whole number") from error


async def wanted_session(request: web.Request, client: str) -> Wanted:
    """The session that a request asks for.

    Raises:
      Refused: the request makes no sense.
    """
    fields, image = await asked(request)
    known(fields, ("avatar", "prompt", "seed", "consent"))
    if image is not None and avatar_name(fields):
        raise Refused(422, "an avatar and an image: send one of them")
    return Wanted(client, avatar_name(fields), image, consent(fields), fields.get("prompt", "a person talking"), whole_number(fields.get("seed", 0), "seed"))
