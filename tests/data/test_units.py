"""Times in another unit or with a decimal comma: the error names the columns of the list and what to do."""

import pytest

from bestrq2.data import DataError, ManifestError, collect, read_manifest

SAMPLES = "divide by the sampling rate (16000)"


@pytest.mark.parametrize(
    ("header", "rows", "columns", "listed", "unit", "cure"),
    [
        ("path,start,end", ["0,80000", "80000,160000"], "start and end are", 80000, "samples", SAMPLES),
        (
            "path,start,end",
            ["0,10000"],
            "start and end are",
            10000,
            "milliseconds",
            f"name the columns start_ms and end_ms; if they count samples, {SAMPLES}",
        ),
        (
            "path,begin,End Time,end_time",
            [",,20000"],
            "end_time is",
            20000,
            "another unit",
            f"convert the column to seconds; if it counts samples, {SAMPLES}",
        ),
        (
            "path,onset,Offset",
            ["0,10000"],
            "onset and Offset are",
            10000,
            "milliseconds",
            f"name the columns start_ms and end_ms; if they count samples, {SAMPLES}",
        ),
        ("path,Seconds", ["10000"], "Seconds is", 10000, "milliseconds", "name the column duration_ms"),
        ("path,duration", ["0.1667"], "duration is", 0.1667, "minutes", "multiply by 60"),
    ],
)
def test_columns_in_another_unit_are_named_with_the_remedy(
    header, rows, columns, listed, unit, cure, tmp_path, write_wav
):
    path, table = write_wav("a.wav", 10.0), tmp_path / "m.csv"
    table.write_text("\n".join([header, *(f"a.wav,{row}" for row in rows), ""]))
    with pytest.raises(DataError) as error:
        collect(table)
    has = f"{path} has 10.000 s, the list says {listed}"
    assert str(error.value) == f"{table}: {columns} expected in seconds; {has}, which looks like {unit}: {cure}"


def test_decimal_commas_are_told(tmp_path):
    (tmp_path / "m.csv").write_text("path;start;end\na.wav;1,5;3,5\n")
    with pytest.raises(ManifestError, match=r"start must be .* got '1,5': write it with a decimal point, 1\.5$"):
        read_manifest(tmp_path / "m.csv")
