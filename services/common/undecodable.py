"""Which field of a message that cannot be decoded is to blame."""

from google.protobuf import empty_pb2, unknown_fields
from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.message import DecodeError

from services.common.errors import FieldViolation, InvalidRequestError

__all__ = ["undecodable"]

_LENGTH_DELIMITED = 2


def undecodable(descriptor: Descriptor, data: bytes) -> InvalidRequestError:
    """The error of a `descriptor` message that does not decode: names every string field that is not UTF-8."""
    found = _bad_strings(descriptor, data, "")
    if not found:
        found = [FieldViolation("", f"the bytes are no {descriptor.full_name}")]
    return InvalidRequestError(*found)


def _bad_strings(descriptor: Descriptor, data: bytes, path: str) -> list[FieldViolation]:
    try:
        fields = unknown_fields.UnknownFieldSet(empty_pb2.Empty.FromString(data))
    except DecodeError:
        return []
    found: list[FieldViolation] = []
    for index in range(len(fields)):  # the stubs know no iteration
        raw = fields[index]
        field = descriptor.fields_by_number.get(raw.field_number)
        if field is None or raw.wire_type != _LENGTH_DELIMITED:
            continue
        if field.type == FieldDescriptor.TYPE_STRING:
            try:
                raw.data.decode("utf-8")
            except UnicodeDecodeError as error:
                found.append(FieldViolation(path + field.name, f"not UTF-8: byte {error.start} is {error.reason}"))
        elif field.message_type is not None:
            found += _bad_strings(field.message_type, raw.data, f"{path}{field.name}.")
    return found
