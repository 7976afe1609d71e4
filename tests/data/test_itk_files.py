"""MetaImage and NRRD files: valid ones are read as SimpleITK reads them, all others raise DataError."""

from __future__ import annotations

import gzip
import random
import tracemalloc
import zlib
from pathlib import Path

import nibabel
import numpy as np
import pytest
import SimpleITK as sitk

from ccella_fast.data.readers.volume_file import files_of_volume, read_volume
from ccella_fast.errors import DataError
from image_file_fixtures import SHAPE, stored_bytes, stored_values, write_image

MHD_RAW = {"ElementDataFile": "voxels.raw"}
NHDR_RAW = {"data file": "voxels.raw"}


def expect_defect(path: Path, words: str) -> DataError:
    with pytest.raises(DataError, match=words) as caught:
        read_volume(path)
    error = caught.value
    assert error.path and Path(error.path).parent == path.parent and error.field and error.fix
    assert len(str(error).splitlines()) <= 5
    return error


def expect_as_simpleitk(path: Path) -> None:
    """Every voxel has the value and the place (LPS) that SimpleITK gives it."""
    image, volume = sitk.ReadImage(str(path)), read_volume(path)
    assert nibabel.aff2axcodes(volume.affine) == ("R", "A", "S")
    assert sorted(image.GetSize()) == sorted(volume.array.shape)
    to_index = np.linalg.inv(volume.affine)
    for index in np.ndindex(*image.GetSize()):
        point = np.array(image.TransformIndexToPhysicalPoint(index)) * [-1, -1, 1]
        place = nibabel.affines.apply_affine(to_index, point)
        np.testing.assert_allclose(place, np.rint(place), atol=1e-5)
        assert volume.array[tuple(np.rint(place).astype(int))] == np.float32(image[index])


# ---- what is read ----

MHA_TYPES = {"CHAR": "i1", "UCHAR": "u1", "SHORT": "i2", "USHORT": "u2", "INT": "i4", "UINT": "u4", "LONG": "i4", "ULONG": "u4",
             "LONG_LONG": "i8", "ULONG_LONG": "u8", "FLOAT": "f4", "DOUBLE": "f8"}  # fmt: skip
NRRD_TYPES = {"signed char": "i1", "uint8": "u1", "uchar": "u1", "short": "i2", "signed short int": "i2",
              "unsigned short": "u2", "uint16_t": "u2", "int": "i4", "unsigned int": "u4", "int64": "i8", "long long int": "i8",
              "unsigned long long": "u8", "float": "f4", "double": "f8"}  # fmt: skip


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("name", MHA_TYPES)
def test_metaimage_types(tmp_path: Path, name: str, order: str):
    changes = {"ElementType": f"MET_{name}", "BinaryDataByteOrderMSB": str(order == ">")}
    expect_as_simpleitk(write_image(tmp_path / "a.mha", changes, stored_bytes(order + MHA_TYPES[name])))


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("name", NRRD_TYPES)
def test_nrrd_types(tmp_path: Path, name: str, order: str):
    changes = {"type": name, "endian": "big" if order == ">" else "little"}
    expect_as_simpleitk(write_image(tmp_path / "a.nrrd", changes, stored_bytes(order + NRRD_TYPES[name])))


VALID_MHA = {
    "other names": {"TransformMatrix": None, "Rotation": "0 1 0 -1 0 0 0 0 1", "Offset": None, "Position": "10 20 30"},
    "older names": {"TransformMatrix": None, "Orientation": "0 1 0 -1 0 0 0 0 1", "Offset": None, "Origin": "10 20 30"},
    "oblique": {"TransformMatrix": "0.8 0.6 0 -0.6 0.8 0 0 0 1"},
    "left-handed": {"TransformMatrix": "0 0 1 1 0 0 0 -1 0"},
    "element size": {"ElementSpacing": None, "ElementSize": "1 2 4"},
    "byte order": {"BinaryDataByteOrderMSB": None, "ElementByteOrderMSB": "False"},
    "user's fields": {"0010|0010": "a = b: c", "Comment": "NDims = 9", "Modality": "MET_MOD_MR", "CenterOfRotation": "1 2 3"},
    "neutral": {"ElementNumberOfChannels": "1", "HeaderSize": "0", "AnatomicalOrientation": "RAI", "ElementMax": "9",
                "ElementToIntensityFunctionSlope": "1", "ElementToIntensityFunctionOffset": "0"},
    "local": {"ElementDataFile": "local"},
}  # fmt: skip


@pytest.mark.parametrize("changes", VALID_MHA.values(), ids=VALID_MHA)
def test_metaimage_headers(tmp_path: Path, changes: dict[str, str | None]):
    expect_as_simpleitk(write_image(tmp_path / "a.mha", changes))


VALID_NRRD = {
    "RAS": {"space": "right-anterior-superior"}, "LAS": {"space": "LAS"}, "capitals": {"space": "Left-Posterior-Superior"},
    "oblique": {"space directions": "(1.2,0.9,0) (-1.2,1.6,0) (0,0,3)"},
    "blanks": {"space directions": "( 0, 1.5 ,0 ) (-2,0,0)(0,0,3)", "space origin": "( 10, 20 , 30)"},
    "fields": {"centerings": "node node node", "space units": '"mm" "mm" "mm"', "content": "T2", "spacings": "nan nan nan",
               "measurement frame": "(1,0,0) (0,1,0) (0,0,1)", "thicknesses": "nan nan 3", "labels": '"x" "y" "z"'},
    "skip": {"byte skip": "0", "line skip": "0"},
    "axis of 1": {"dimension": "4", "sizes": "1 5 4 3", "kinds": "list domain domain domain",
                  "space directions": "none (0,1.5,0) (-2,0,0) (0,0,3)"},
}  # fmt: skip


@pytest.mark.parametrize("changes", VALID_NRRD.values(), ids=VALID_NRRD)
def test_nrrd_headers(tmp_path: Path, changes: dict[str, str | None]):
    expect_as_simpleitk(write_image(tmp_path / "a.nrrd", changes))


@pytest.mark.parametrize("suffix", [".mha", ".nrrd"])
def test_line_ends_comments_and_pairs(tmp_path: Path, suffix: str):
    expect_as_simpleitk(write_image(tmp_path / f"a{suffix}", {}, end="\r\n"))
    path = write_image(tmp_path / f"b{suffix}", {})
    extra = b"# sizes: 9\nname:=a: b\n" if suffix == ".nrrd" else b"Name = a\n"
    first, _, rest = path.read_bytes().partition(b"\n")
    path.write_bytes(first + b"\n" + extra + rest)
    expect_as_simpleitk(path)


def test_a_last_axis_of_one_is_left_out(tmp_path: Path):
    plain = read_volume(write_image(tmp_path / "a.mha", {}))
    changes = {"NDims": "4", "DimSize": "5 4 3 1", "ElementSpacing": "1.5 2 3 1", "Offset": "10 20 30 0",
               "TransformMatrix": "0 1 0 0 -1 0 0 0 0 0 1 0 0 0 0 1"}  # fmt: skip
    volume = read_volume(write_image(tmp_path / "b.mha", changes))
    np.testing.assert_array_equal(volume.array, plain.array)
    np.testing.assert_array_equal(volume.affine, plain.affine)
    expect_defect(write_image(tmp_path / "c.mha", changes | {"DimSize": "5 4 3 2"}, 2 * stored_bytes()), "2 volumes")
    nrrd = {"dimension": "4", "sizes": "2 5 4 3", "space directions": "none (0,1.5,0) (-2,0,0) (0,0,3)"}
    expect_defect(write_image(tmp_path / "c.nrrd", nrrd, 2 * stored_bytes()), "2 values per voxel")


def test_simpleitk_writes_what_is_read(tmp_path: Path):
    image = sitk.GetImageFromArray(np.random.default_rng(0).normal(0, 99, (3, 4, 5)))
    image.SetSpacing([0.7, 1.1, 3.3])
    image.SetOrigin([-7.5, 2e-9, 123.25])
    image.SetDirection([0.8, 0.6, 0, -0.6, 0.8, 0, 0, 0, -1])
    for name in ("a.mha", "a.mhd", "a.nrrd", "a.nhdr"):
        for compressed in (False, True):
            sitk.WriteImage(image, str(tmp_path / name), compressed)
            expect_as_simpleitk(tmp_path / name)


# ---- voxels in another file ----


@pytest.mark.parametrize(("name", "fields"), [("t2w.mhd", MHD_RAW), ("t2w.nhdr", NHDR_RAW), ("t2w.nrrd", NHDR_RAW)])
def test_voxels_in_another_file(tmp_path: Path, name: str, fields: dict[str, str]):
    path, raw = write_image(tmp_path / name, fields, b""), tmp_path / "voxels.raw"
    expect_defect(path, "'voxels.raw', is missing")
    raw.write_bytes(stored_bytes())
    expect_as_simpleitk(path)
    assert files_of_volume(path) == [path, raw]
    for data, words in ((stored_bytes()[:-1], "cut off"), (stored_bytes() + b"\0", "more data")):
        raw.write_bytes(data)
        expect_defect(path, words)
    raw.write_bytes(b"12345" + stored_bytes())  # a header of its own
    for skip in ("-1", "5"):
        skipped = fields | ({"HeaderSize": skip} if name == "t2w.mhd" else {"byte skip": skip})
        expect_as_simpleitk(write_image(path, skipped, b""))
    raw.unlink()
    raw.mkdir()
    expect_defect(path, "missing")


def test_a_detached_header_may_end_with_its_file(tmp_path: Path):
    path = write_image(tmp_path / "t2w.nhdr", NHDR_RAW, b"")
    path.write_bytes(path.read_bytes()[:-1])
    (tmp_path / "voxels.raw").write_bytes(stored_bytes())
    np.testing.assert_array_equal(np.sort(read_volume(path).array, None), np.sort(stored_values(), None))
    expect_defect(write_image(path, {}), "does not state data file")


@pytest.mark.parametrize(
    "name", ["../voxels.raw", "/etc/passwd", "a/b.raw", "a\\b.raw", "..", ".", "a%03d.raw 1 3 1", "LIST", "\x01"]
)
def test_only_a_file_in_the_folder_of_the_header_is_opened(tmp_path: Path, name: str):
    (tmp_path / "voxels.raw").write_bytes(stored_bytes())
    folder = tmp_path / "study"
    folder.mkdir()
    expect_defect(write_image(folder / "t2w.mhd", {"ElementDataFile": name}, b""), "folder of the header|several files")
    expect_defect(write_image(folder / "t2w.nhdr", {"data file": name}, b""), "folder of the header|several files")


def test_links_to_the_file_of_the_voxels(tmp_path: Path):
    archive, folder = tmp_path / "archive", tmp_path / "study"
    archive.mkdir()
    folder.mkdir()
    (archive / "voxels.raw").write_bytes(stored_bytes())
    original = write_image(archive / "t2w.mhd", MHD_RAW, b"")
    (folder / "t2w.mhd").symlink_to(original)  # allowed or not where studies are found
    expect_as_simpleitk(original)
    np.testing.assert_array_equal(read_volume(folder / "t2w.mhd").array, read_volume(original).array)
    (folder / "t2w.mhd").unlink()
    write_image(folder / "t2w.mhd", MHD_RAW, b"")
    (folder / "voxels.raw").symlink_to(archive / "voxels.raw")
    expect_defect(folder / "t2w.mhd", "link that leaves the folder")


# ---- bytes and voxels ----


@pytest.mark.parametrize("suffix", [".mha", ".nrrd"])
@pytest.mark.parametrize("compressed", [False, True], ids=["raw", "compressed"])
def test_the_file_holds_exactly_the_bytes_of_its_voxels(tmp_path: Path, suffix: str, compressed: bool):
    """A stream that ends early becomes unwritten memory in ITK; one that is longer than the voxels is a wrong header."""
    is_nrrd = suffix == ".nrrd"
    pack = (gzip.compress if is_nrrd else zlib.compress) if compressed else bytes
    fields: dict[str, str | None] = {"encoding": "gzip"} if is_nrrd else {"CompressedData": "True"}
    fields = fields if compressed else {}
    path, size, kind = tmp_path / f"a{suffix}", "sizes" if is_nrrd else "DimSize", "type" if is_nrrd else "ElementType"
    plain = read_volume(write_image(path, {}))  # as SimpleITK reads it, see above
    np.testing.assert_array_equal(read_volume(write_image(path, fields, pack(stored_bytes()))).array, plain.array)
    for wrong in ({size: "5 4 6"}, {kind: "double" if is_nrrd else "MET_DOUBLE"}):
        expect_defect(write_image(path, fields | wrong, pack(stored_bytes())), "cut off|holds 120 bytes of voxels")
    for wrong in ({size: "5 4 2"}, {kind: "uchar" if is_nrrd else "MET_UCHAR"}):
        expect_defect(write_image(path, fields | wrong, pack(stored_bytes())), "more data than its header says")
    for short in (b"", stored_bytes()[:-1], stored_bytes()[: len(stored_bytes()) // 2]):
        expect_defect(write_image(path, fields, pack(short)), "cut off|holds [0-9]+ bytes of voxels")
    expect_defect(write_image(path, fields, pack(stored_bytes()) + b"\0"), "more data than its header says")
    expect_defect(write_image(path, fields, pack(stored_bytes())[:-1]), "cut off")


def test_compressed_voxels_without_their_size_are_read(tmp_path: Path):
    stream, changes = zlib.compress(stored_bytes()), {"CompressedData": "True"}
    expected = read_volume(write_image(tmp_path / "a.mha", {})).array
    np.testing.assert_array_equal(read_volume(write_image(tmp_path / "b.mha", changes, stream)).array, expected)
    unwritten = sitk.GetArrayFromImage(sitk.ReadImage(str(tmp_path / "b.mha")))
    assert (
        np.sort(unwritten, None) != np.sort(stored_values(), None)
    ).any()  # control: ITK returns memory as it found it


def test_compressed_data_size_is_that_of_the_stream(tmp_path: Path):
    stream = zlib.compress(stored_bytes())
    fields = {"CompressedData": "True", "CompressedDataSize": str(len(stream))}
    expect_as_simpleitk(write_image(tmp_path / "a.mha", fields, stream))
    for size in (len(stream) // 2, len(stream) + 1):
        path = write_image(tmp_path / "a.mha", fields | {"CompressedDataSize": str(size)}, stream)
        expect_defect(path, f"its header says {size} bytes of compressed voxels, but it holds {len(stream)}")


def test_every_flipped_bit_of_compressed_voxels_is_noticed(tmp_path: Path):
    path = tmp_path / "a.mha"
    stream, changes = zlib.compress(stored_bytes()), {"CompressedData": "True"}
    expected, accepted = read_volume(write_image(path, changes, stream)).array, 0
    for bit in range(0, 8 * len(stream), 3):
        flipped = bytearray(stream)
        flipped[bit // 8] ^= 1 << bit % 8
        write_image(path, changes, bytes(flipped))
        try:
            np.testing.assert_array_equal(read_volume(path).array, expected)
        except DataError:
            continue
        accepted += 1
    assert accepted < 5, "only bits that mean nothing, such as those that fill the last byte"
    raw = bytearray(stored_bytes())
    raw[8] ^= 4
    assert (read_volume(write_image(path, {}, bytes(raw))).array != expected).sum() == 1  # control: raw has no checksum


def test_bombs_are_refused_without_memory(tmp_path: Path):
    deflate = zlib.compressobj(9)
    bomb = b"".join(deflate.compress(bytes(2**20)) for _ in range(200)) + deflate.flush()
    tracemalloc.start()
    try:
        for size, words in (("5 4 3", "more data"), ("600 600 600", "cut off"), ("32767 32767 32767", "claims a size")):
            mha = {"CompressedData": "True", "DimSize": size, "ElementType": "MET_DOUBLE"}
            expect_defect(write_image(tmp_path / "a.mha", mha, bomb), words)
            nrrd = {"encoding": "gzip", "sizes": size, "type": "double"}
            expect_defect(write_image(tmp_path / "a.nrrd", nrrd, bomb), words)
        # Few bytes in the file, and more in the stream than in the volume; the file is too small to be refused by its size.
        mha = {"CompressedData": "True", "DimSize": "100 100 10"}
        expect_defect(write_image(tmp_path / "a.mha", mha, bomb[:60_000]), "more data")
        assert tracemalloc.get_traced_memory()[1] < 2**24
    finally:
        tracemalloc.stop()


# ---- headers that are refused ----

MISSING = [
    ("a.mha", field) for field in ("NDims", "DimSize", "ElementType", "ElementSpacing", "TransformMatrix", "Offset",
                                   "ElementByteOrderMSB")
] + [
    ("a.nrrd", field) for field in ("type", "dimension", "sizes", "endian", "encoding", "space", "space directions",
                                    "space origin")
]  # fmt: skip


@pytest.mark.parametrize(("name", "field"), MISSING, ids=[f"{name}-{field}" for name, field in MISSING])
def test_what_a_header_does_not_state_is_not_invented(tmp_path: Path, name: str, field: str):
    written = {"ElementByteOrderMSB": "BinaryDataByteOrderMSB"}.get(field, field)
    error = expect_defect(write_image(tmp_path / name, {written: None}), f"does not state {field} ")
    assert error.field == field


REFUSED = [
    ("a.mha", {"NDims": "100"}, "NDims is '100'"),
    ("a.mha", {"NDims": "2"}, "NDims"),
    ("a.mha", {"NDims": ""}, "NDims"),
    ("a.mha", {"DimSize": "5 4"}, "DimSize"),
    ("a.mha", {"DimSize": "5 4 -3"}, "DimSize"),
    ("a.mha", {"DimSize": "5 4 3 1"}, "DimSize"),
    ("a.mha", {"DimSize": "5 4 1"}, "claims a size"),
    ("a.mha", {"DimSize": "5 4 99999999999"}, "DimSize"),
    ("a.mha", {"ElementSpacing": "1 1 0"}, "voxel size"),
    ("a.mha", {"ElementSpacing": "1 1 -2"}, "voxel size"),
    ("a.mha", {"ElementSpacing": "1 1 nan"}, "ElementSpacing"),
    ("a.mha", {"ElementSpacing": "1 1 inf"}, "ElementSpacing"),
    ("a.mha", {"ElementSpacing": "1 1 1e99"}, "ElementSpacing"),
    ("a.mha", {"ElementSpacing": "1 1 1 1"}, "ElementSpacing"),
    ("a.mha", {"TransformMatrix": "1 0 0 0 1 0 0 0 2"}, "length 1"),
    ("a.mha", {"TransformMatrix": "1 0 0 0 1 0 0 0 0"}, "length 1"),
    ("a.mha", {"TransformMatrix": "1 0 0 0.6 0.8 0 0 0 1"}, "right angles"),
    ("a.mha", {"Offset": "1 2 1e30"}, "Offset"),
    ("a.mha", {"Position": "1 2 3"}, "gives Offset twice"),
    ("a.mha", {"dimsize": "5 4 3"}, "gives DimSize twice"),
    ("a.mha", {"ElementType": "MET_STRING"}, "ElementType"),
    ("a.mha", {"ElementType": "MET_FLOAT_ARRAY"}, "ElementType"),
    ("a.mha", {"ElementNumberOfChannels": "3"}, "ElementNumberOfChannels"),
    ("a.mha", {"BinaryData": "False"}, "BinaryData"),
    ("a.mha", {"BinaryDataByteOrderMSB": "maybe"}, "ElementByteOrderMSB"),
    ("a.mha", {"HeaderSize": "5"}, "HeaderSize is 5"),
    ("a.mha", {"ElementToIntensityFunctionSlope": "2"}, "Slope is not 1"),
    ("a.mha", {"DistanceUnits": "cm"}, "DistanceUnits"),
    ("a.mha", {"ElementToIntensityFunctionOffset": "-1"}, "Offset is not 0"),
    ("a.mha", {"ObjectType": "Mesh"}, "ObjectType"),
    ("a.nrrd", {"dimension": "16"}, "dimension is '16'"),
    ("a.nrrd", {"sizes": "5 4"}, "sizes"),
    ("a.nrrd", {"sizes": "5 4 1"}, "claims"),
    ("a.nrrd", {"type": "block"}, "type is 'block'"),
    ("a.nrrd", {"encoding": "bzip2"}, "encoding"),
    ("a.nrrd", {"encoding": "txt"}, "encoding"),
    ("a.nrrd", {"space": "scanner-xyz"}, "RAS, LAS or LPS"),
    ("a.nrrd", {"space": "3D-right-handed"}, "RAS, LAS or LPS"),
    ("a.nrrd", {"space": None, "space dimension": "3"}, "does not state space "),
    ("a.nrrd", {"space directions": "none (-2,0,0) (0,0,3)"}, "gives 2 vectors"),
    ("a.nrrd", {"space origin": "(1,2)"}, "origin"),
    ("a.nrrd", {"space directions": "(0,1.5,0) (nan,0,0) (0,0,3)"}, "directions"),
    ("a.nrrd", {"space directions": "(0,0,0) (-2,0,0) (0,0,3)"}, "voxel size"),
    ("a.nrrd", {"space directions": "(0,1.5,1) (-2,0,0) (0,0,3)"}, "right angles"),
    ("a.nrrd", {"space directions": None, "spacings": "1 1 3"}, "does not state space directions"),
    ("a.nrrd", {"spacings": "1 1 3"}, "spacings"),
    ("a.nrrd", {"space units": '"cm" "cm" "cm"'}, "space units"),
    ("a.nrrd", {"line skip": "1"}, "line skip"),
    ("a.nrrd", {"encoding": "gzip", "byte skip": "3"}, "byte skip"),
    ("a.nrrd", {"Sizes": "5 4 3"}, "gives sizes twice"),
    ("a.nrrd", {"colour": "red"}, "line 11 of the header"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "changes", "words"), REFUSED, ids=[f"{row[0]}-{row[2]}-{n}" for n, row in enumerate(REFUSED)]
)
def test_invalid_header_raises(tmp_path: Path, name: str, changes: dict[str, str | None], words: str):
    expect_defect(write_image(tmp_path / name, changes), words)


@pytest.mark.parametrize(
    "field", ["type", "endian", "encoding", "space", "kinds", "content", "sizes", "space directions"]
)
def test_long_lines_of_nrrd_do_not_crash(tmp_path: Path, field: str):
    """NrrdIO writes beyond its buffers; here a free text is read and every other field is refused."""
    path = write_image(tmp_path / "a.nrrd", {field: "x" * 70_000})
    if field in ("kinds", "content"):
        np.testing.assert_array_equal(np.sort(read_volume(path).array, None), np.sort(stored_values(), None))
    else:
        assert "xxxx" not in str(expect_defect(path, f"{field} is a text of 70000 characters"))


@pytest.mark.parametrize(
    "content", [b"", b"\0" * 5000, b"NRRD", b"NRRD0009\n\n", b"NDims = 3\n" * 9, b"ElementDataFile", b"\xff" * 2**21]
)
def test_other_files_raise(tmp_path: Path, content: bytes):
    for suffix in (".mha", ".mhd", ".nrrd", ".nhdr"):
        (tmp_path / f"a{suffix}").write_bytes(content)
        expect_defect(tmp_path / f"a{suffix}", "is not a|does not state")


def test_no_message_repeats_words_of_a_header(tmp_path: Path):
    for name, field in (
        ("a.mha", "ElementType"),
        ("a.mha", "ElementSpacing"),
        ("a.nrrd", "space"),
        ("a.nrrd", "sizes"),
    ):
        error = expect_defect(write_image(tmp_path / name, {field: "Jane Roe 1950"}), "a text of 13 characters")
        assert "Roe" not in str(error)


@pytest.mark.parametrize("suffix", [".mha", ".nrrd"])
def test_random_damage_of_a_header_is_refused_or_read_as_it_is_written(tmp_path: Path, suffix: str):
    """Where a damaged header is still accepted, the voxels are those of the file: none is lost, none is made up."""
    path, rng = tmp_path / f"a{suffix}", random.Random(0)
    content = write_image(path, {}).read_bytes()
    end, refused = len(content) - len(stored_bytes()), 0
    for _ in range(400):
        damaged = bytearray(content)
        for _ in range(rng.choice([1, 1, 3])):
            damaged[rng.randrange(end)] = rng.choice([rng.randrange(256), rng.choice(b"0123456789.-\n =:")])
        path.write_bytes(damaged)
        try:
            array = read_volume(path).array
        except DataError as error:
            assert error.field and error.fix
            refused += 1
        else:
            if array.shape in (SHAPE, (4, 5, 3)) and array.max() == stored_values().max():
                np.testing.assert_array_equal(np.sort(array, None), np.sort(stored_values(), None))
            assert array.size * 2 == len(stored_bytes()) or array.size == len(stored_bytes())
    assert 100 < refused < 400
