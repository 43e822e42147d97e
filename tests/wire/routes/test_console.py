"""/console: the page, and files whose addresses have their version."""

import gzip
import hashlib
import re
from importlib.resources import files

import httpx
import pytest

LIBRARIES = files("tokenauth.web") / "pages" / "console"


@pytest.fixture(scope="module")
def base(client: httpx.Client) -> str:
    """Return where the files of this version are."""
    found = re.search(r'src="(console/[0-9a-f]{16})/app\.js"', client.get("/console").text)
    assert found is not None
    return f"/{found[1]}"


def test_the_page_allows_no_inline_code_and_no_frame(client: httpx.Client) -> None:
    answer = client.get("/console")
    assert answer.headers["content-type"] == "text/html; charset=utf-8"
    assert answer.headers["cache-control"] == "no-store"
    policy = dict(part.strip().split(" ", 1) for part in answer.headers["content-security-policy"].split(";"))
    assert policy["default-src"] == policy["frame-ancestors"] == policy["form-action"] == "'none'"
    assert policy["script-src"] == policy["style-src"] == policy["connect-src"] == "'self'"
    assert policy["require-trusted-types-for"] == "'script'"
    assert "unsafe" not in answer.headers["content-security-policy"]


def test_all_files_of_the_page_are_served_for_good(client: httpx.Client, base: str) -> None:
    """Starting with the page, each file that another one loads is there, with the same version."""
    page = client.get("/console").text
    waiting, seen = set(re.findall(r'(?:href|src)="console/[^/]+/([^"]+)"', page)), set[str]()
    while waiting:
        name = waiting.pop()
        seen.add(name)
        answer = client.get(f"{base}/{name}")
        assert answer.status_code == 200, name
        assert answer.headers["cache-control"] == "public, max-age=31536000, immutable"
        assert answer.headers["content-type"].partition(";")[0] in {"text/javascript", "text/css"}
        waiting |= set(re.findall(r'(?:from |import\()"\./([^"]+)"', answer.text)) - seen
    shipped = {
        file.name.removesuffix(".gz") for file in LIBRARIES.iterdir() if ".js" in file.name or ".css" in file.name
    }
    assert seen == shipped | {"style.css"}


@pytest.mark.parametrize(
    "path", ["{base}/console.html", "{base}/NOTICE", "{base}/nothing.js", "/console/0123456789abcdef/app.js", "{base}/"]
)
def test_other_files_and_versions_are_not_found(client: httpx.Client, base: str, path: str) -> None:
    answer = client.get(path.format(base=base))
    assert (answer.status_code, answer.headers["cache-control"]) == (404, "no-store")


def test_the_libraries_are_those_of_the_notice() -> None:
    notice = (LIBRARIES / "NOTICE").read_text()
    for name in ("preact.js.gz", "uplot.js.gz", "uplot.css"):
        content = (LIBRARIES / name).read_bytes()
        plain = gzip.decompress(content) if name.endswith(".gz") else content
        assert re.search(
            rf"^{re.escape(name)} .*?{hashlib.sha256(plain).hexdigest()}", notice, re.DOTALL | re.MULTILINE
        )
