import pytest

from globe.units import byte_size


@pytest.mark.parametrize(
    ("count", "expected"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1.00 kB"),
        (1_234_567, "1.23 MB"),
        (1_234_567_890, "1.23 GB"),
        (10**13, "10000.00 GB"),
    ],
)
def test_bytes_are_said_in_the_largest_unit_that_fits(count: int, expected: str) -> None:
    assert byte_size(count) == expected
