"""Settings of what a registry holds."""

import pytest

from crosskd_ifc import ConfigError
from crosskd_ifc.common.registry import read_options


def taker(x, *, flag=False, scale=1.0, name="a"):
    """Its keyword-only arguments are the possible settings."""


def test_settings_are_of_their_defaults_kind():
    given = ("flag", True, "scale", 2, "name", "b")
    assert read_options("KEY", given, taker) == {"flag": True, "scale": 2, "name": "b"}


@pytest.mark.parametrize(
    "given, problem",
    [
        (("flag", 1), "flag must be True or False"),
        (("scale", True), "scale must be a number"),
        (("x", 1), "there is no 'x'; possible names .defaults.: flag .False., scale .1.0."),
        (("flag",), "NAME VALUE pairs"),
    ],
)
def test_a_setting_of_another_kind_is_refused(given, problem):
    with pytest.raises(ConfigError, match=f"KEY is .*{problem}"):
        read_options("KEY", given, taker)
