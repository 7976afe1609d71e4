"""DICOM files that are compressed as a whole (transfer syntax Deflated Explicit VR Little Endian, PS3.5 section A.5).

pydicom inflates such a file to any size; here it is inflated within a bound first.
"""

from __future__ import annotations

import zlib

MAX_INFLATED = 2**27  # bytes of a series; a large one has half of it
DEFLATED = b"1.2.840.10008.1.2.1.99"
_EXPLICIT = b"1.2.840.10008.1.2.1".ljust(len(DEFLATED), b"\0")
_META = 132  # bytes of the preamble, after which the meta information begins with its length
_GROUP_LENGTH = b"\x02\0\0\0UL\x04\0"


def inflate_dicom(content: bytes, limit: int) -> tuple[bytes, int]:
    """The file without compression, and the number of bytes that were inflated; a file that is not deflated as it is.

    Args:
        content: The whole file.
        limit: The most bytes that may be inflated.

    Raises:
        ValueError: With the reason in the message, if the file is damaged or would be larger.
    """
    start = _META + 12 + int.from_bytes(content[_META + 8 : _META + 12], "little")
    has_length = content[_META : _META + 8] == _GROUP_LENGTH
    if has_length and DEFLATED in content[_META:start]:
        inflate = zlib.decompressobj(wbits=-zlib.MAX_WBITS)
        try:
            inflated = inflate.decompress(content[start:], limit + 1)
        except zlib.error:
            raise ValueError("is damaged: its compressed part cannot be inflated") from None
        if len(inflated) > limit:
            raise ValueError(f"inflates to more than {limit} bytes, together with the others of its folder")
        if not inflate.eof:
            raise ValueError("is cut off: its compressed part does not end")
        if inflate.unused_data not in (b"", b"\0"):  # a byte of padding
            raise ValueError("is damaged: it goes on after the end of its compressed part")
        return content[:start].replace(DEFLATED, _EXPLICIT) + inflated, len(inflated)
    if DEFLATED in content:  # pydicom might find it where it should not be
        raise ValueError("is damaged: it states the deflated transfer syntax, but not in its meta information")
    return content, 0
