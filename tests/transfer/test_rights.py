"""Licenses, gated and private sources, and the destination's own card."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from emb_model_provider.errors import LicenseRequiredError, PermissionRequiredError
from emb_model_provider.transfer import card
from tests.transfer.helpers import DESTINATION, README, SOURCE, mirrored

if TYPE_CHECKING:
    from collections.abc import Callable

    from emb_model_provider.transfer.transfer import Transfer
    from tests.transfer.servers import DestinationServer, SourceServer

    Make = Callable[..., Transfer]

OWN_README = b"---\nlicense: apache-2.0\ntasks:\n- sentence-embedding\n---\n# my text\n"


# --- licenses -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("declared", [None, "unknown", "other"])
def test_a_source_without_a_license_needs_one(
    declared: str | None, transfer: Make, source: SourceServer, destination: DestinationServer
) -> None:
    """ModelScope would label the copy Apache-2.0."""
    source.info[SOURCE] = {"cardData": {"license": declared}}
    source.repos[SOURCE]["README.md"] = b"# no front matter\n"
    with pytest.raises(LicenseRequiredError, match="--license"):
        transfer().run(SOURCE, DESTINATION)
    assert DESTINATION not in destination.repos
    assert transfer(license="bsd-3-clause").run(SOURCE, DESTINATION).state == "done"
    assert destination.info[DESTINATION]["license"] == "bsd-3-clause"


@pytest.mark.parametrize(
    ("info", "expected"),
    [
        ({"cardData": {"license": "apache-2.0"}}, "apache-2.0"),
        ({"cardData": {"license": ["cc-by-4.0", "mit"]}}, "cc-by-4.0"),
        ({"cardData": {"license": "other", "license_name": "my-license"}}, "my-license"),
        ({"tags": ["region:us", "license:bsd-2-clause"]}, "bsd-2-clause"),
        ({}, "mit"),
    ],
)
def test_the_license_of_the_source_is_passed_on(
    info: dict[str, object], expected: str, transfer: Make, source: SourceServer, destination: DestinationServer
) -> None:
    """It is that of the card, of a tag, or of the front matter of the README."""
    source.info[SOURCE] = info
    transfer().run(SOURCE, DESTINATION)
    assert destination.info[DESTINATION]["license"] == expected


@pytest.mark.parametrize(
    "info",
    [
        {"gated": "auto", "cardData": {"license": "mit"}},
        {"cardData": {"license": "cc-by-nc-4.0"}},
        {"cardData": {"license": "other", "license_name": "acme-research-license"}},
        {"cardData": {"license": "apple-amlr"}},
    ],
    ids=str,
)
def test_gated_and_non_commercial_sources_need_a_permission(
    info: dict[str, object], transfer: Make, source: SourceServer, destination: DestinationServer
) -> None:
    """They stop with the text of the license."""
    source.info[SOURCE] = info
    source.repos[SOURCE] |= {"LICENSE.md": b"You may not sell this.", "docs/LICENSE": b"no"}
    with pytest.raises(PermissionRequiredError, match="--i-have-permission") as raised:
        transfer().run(SOURCE, DESTINATION)
    assert "You may not sell this." in str(raised.value)
    assert DESTINATION not in destination.repos
    assert transfer(has_permission=True).run(SOURCE, DESTINATION).state == "done"
    assert destination.info[DESTINATION]["private"] is ("gated" in info)


@pytest.mark.parametrize(
    "license_id", ["apache-2.0", "mit", "cc-by-sa-4.0", "gemma", "openrail++", "ncsa", "bsd-3-clause"]
)
def test_other_licenses_need_no_permission(license_id: str, transfer: Make, source: SourceServer) -> None:
    source.info[SOURCE] = {"cardData": {"license": license_id}}
    assert transfer().plan(SOURCE, DESTINATION).state == "planned"


# --- visibility ---------------------------------------------------------------------------------------


def test_a_private_source_has_a_private_copy(
    transfer: Make, source: SourceServer, destination: DestinationServer
) -> None:
    source.info[SOURCE] = {"private": True, "cardData": {"license": "mit"}}
    transfer().run(SOURCE, DESTINATION)
    assert destination.info[DESTINATION]["private"] is True


def test_a_private_source_is_not_copied_to_a_public_repository(
    transfer: Make, source: SourceServer, destination: DestinationServer
) -> None:
    destination.repos[DESTINATION] = {}
    destination.info[DESTINATION] = {"private": False}
    source.info[SOURCE] = {"private": True, "cardData": {"license": "mit"}}
    with pytest.raises(PermissionRequiredError, match=r"is private, but .* is public"):
        transfer().run(SOURCE, DESTINATION)
    assert destination.repos[DESTINATION] == {}


# --- the card of the destination ----------------------------------------------------------------------


def test_the_card_of_the_destination_is_kept(
    transfer: Make, source: SourceServer, destination: DestinationServer
) -> None:
    """The front matter of its README and its configuration.json stay, the text of the README is that of the source."""
    destination.repos[DESTINATION] = {"README.md": OWN_README, "configuration.json": b'{"task": "mine"}'}
    source.repos[SOURCE]["configuration.json"] = b'{"task": "theirs"}'
    result = transfer().run(SOURCE, DESTINATION)
    assert result.kept == ("configuration.json", "README.md")
    stored = destination.repos[DESTINATION]
    assert stored["configuration.json"] == b'{"task": "mine"}'
    assert stored["README.md"] == b"---\nlicense: apache-2.0\ntasks:\n- sentence-embedding\n---\n# tiny\n"
    assert transfer().run(SOURCE, DESTINATION).state == "same"
    assert transfer().verify(SOURCE, DESTINATION).state == "same"


def test_the_card_is_overwritten_on_request(
    transfer: Make, source: SourceServer, destination: DestinationServer
) -> None:
    destination.repos[DESTINATION] = {"README.md": OWN_README, "configuration.json": b"{}"}
    source.repos[SOURCE]["configuration.json"] = b'{"task": "theirs"}'
    assert transfer(overwrite_card=True).run(SOURCE, DESTINATION).kept == ()
    assert mirrored(source, destination)


def test_the_card_that_a_hub_generates_is_replaced(
    transfer: Make, source: SourceServer, destination: DestinationServer
) -> None:
    """Also if the transfer that created the repository was interrupted. Later changes of its owner are kept."""
    destination.uploads.statuses["PUT"] = [(403, {})]
    with pytest.raises(Exception, match="access was refused"):
        transfer().run(SOURCE, DESTINATION)
    assert b"# generated" in destination.repos[DESTINATION]["README.md"]
    transfer().run(SOURCE, DESTINATION)
    assert destination.repos[DESTINATION]["README.md"] == README
    destination.repos[DESTINATION]["README.md"] = OWN_README
    transfer().run(SOURCE, DESTINATION)
    assert destination.repos[DESTINATION]["README.md"].startswith(b"---\nlicense: apache-2.0\n")


@pytest.mark.parametrize(
    ("readme", "own", "expected"),
    [
        (b"text", b"---\na: 1\n---\nold", b"---\na: 1\n---\ntext"),
        (b"---\nb: 2\n---\ntext", b"---\na: 1\n---\nold", b"---\na: 1\n---\ntext"),
        (b"---\nb: 2\n---\ntext", b"old", b"---\nb: 2\n---\ntext"),
        (b"---\r\nb: 2\r\n---\r\ntext", b"\xef\xbb\xbf---\na: 1\n---\n", b"\xef\xbb\xbf---\na: 1\n---\ntext"),
        (b"text\n---\nb: 2\n---\n", b"---\na: 1\n---", b"---\na: 1\n---text\n---\nb: 2\n---\n"),
    ],
)
def test_front_matter_is_replaced(readme: bytes, own: bytes, expected: bytes) -> None:
    assert card.keep_front_matter(readme, own) == expected


@pytest.mark.parametrize(
    ("readme", "expected"),
    [
        (b"---\nlicense: mit\n---\n", "mit"),
        (b"---\nlicense:\n- apache-2.0\n- mit\n---\n", "apache-2.0"),
        (b'---\nlicense: other\nlicense_name: "my-license"\n---\n', "my-license"),
        (b"---\ntags: [a]\n---\nlicense: mit\n", None),
        (b"license: mit\n", None),
    ],
)
def test_the_license_in_a_readme(readme: bytes, expected: str | None) -> None:
    assert card.license_in(readme) == expected


@pytest.mark.parametrize(
    ("readme", "expected"),
    [
        (b"# text\n", b"---\nlicense: mit\n---\n# text\n"),
        (b"---\ntags: [a]\n---\n# text\n", b"---\nlicense: mit\ntags: [a]\n---\n# text\n"),
        (b"---\na: 1\nlicense: Apache License 2.0\nb: 2\n---\n", b"---\nlicense: mit\na: 1\nb: 2\n---\n"),
        (b"---\nlicense:\n- a\n- b\ntags:\n- c\n---\n", b"---\nlicense: mit\ntags:\n- c\n---\n"),
        (b"---\nlicense: other\nlicense_name: x\nlicense_link: y\n---\n", b"---\nlicense: mit\n---\n"),
    ],
)
def test_the_license_in_a_readme_is_replaced(readme: bytes, expected: bytes) -> None:
    assert card.set_license(readme, "mit") == expected
