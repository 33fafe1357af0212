"""Names of many files in one text."""

from __future__ import annotations

import pytest

from partialfc.data.urls import expand
from partialfc.errors import ConfigError


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("a.tar", ["a.tar"]),
        ("s-{08..10}.tar", ["s-08.tar", "s-09.tar", "s-10.tar"]),
        ("s-{8..10}", ["s-8", "s-9", "s-10"]),
        ("s-{000..001}", ["s-000", "s-001"]),
        ("{a,b}/{1..2}", ["a/1", "a/2", "b/1", "b/2"]),
        ("{a,b{1..2}}", ["a", "b1", "b2"]),
        ("a::b-{1..2}::c", ["a", "b-1", "b-2", "c"]),
        ("a{,x}", ["a", "ax"]),
        ("/data/2024: x.tar", ["/data/2024: x.tar"]),
    ],
)
def test_braces_and_joined_names_are_expanded(text: str, names: list[str]) -> None:
    assert expand(text) == names


def test_webdataset_expands_to_the_same_names() -> None:
    expand_urls = pytest.importorskip("webdataset.shardlists", reason="not installed: webdataset").expand_urls
    for text in ("s-{000098..000101}.tar", "{a,b}-{8..11}.tar", "x::y-{0..2}"):
        assert expand(text) == expand_urls(text)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a{1..2", "without '}'"),
        ("a}", "without '{'"),
        ("a{}", "expected a range"),
        ("a{b}", "expected a range"),
        ("a{2..1}", "not rising"),
        ("a{0..99999999}", "more than"),
        ("{0..9999}{0..9999}", "more than"),
        ("{0..999999}::{0..999999}", "more than"),
        ("{" * 5000 + "a,b" + "}" * 5000, "too many braces|expected a range"),
        ("{1..1}" * 3000, "too many braces"),
        ("a::::b", "is empty"),
        ("https://host/a-{0..1}.tar", "only local files"),
        ("pipe:cat a.tar", "only local files"),
        ("s3:/bucket/a.tar", "only local files"),
    ],
)
def test_what_stands_for_no_names_is_explained(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        expand(text)
