"""The types of tokenauth.js, checked with TypeScript: its own, and those that tokenauth.d.ts declares."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.support.servers import ROOT
from tests.support.skipping import skip_without

pytestmark = pytest.mark.extended

PAGES = ROOT / "tokenauth/web/pages"

OPTIONS = (
    "--noEmit --pretty false --allowJs --checkJs --strict --skipLibCheck"
    " --target es2022 --module es2022 --moduleResolution node --lib es2022,dom,dom.iterable"
)

AGREE = """
import * as written from "./implementation.js";
import * as declared from "./tokenauth.js";

// Without private members, which make two classes different.
type Public<T> = { [K in keyof T]: T[K] };
type Events = "addEventListener" | "removeEventListener"; // declared more precisely than EventTarget's
type Same<A, B> = [A, B] extends [B, A] ? true : { only: A; and: B };

const names: Same<keyof typeof written, keyof typeof declared> = true;
const methods: Same<
  Public<Omit<written.TokenAuth, Events>>, Public<Omit<declared.TokenAuth, Events>>
> = true;
const made: Same<
  ConstructorParameters<typeof written.TokenAuth>, ConstructorParameters<typeof declared.TokenAuth>
> = true;
const errors: Same<Public<written.TokenAuthError>, Public<declared.TokenAuthError>> = true;
const raised: Same<
  ConstructorParameters<typeof written.TokenAuthError>, ConstructorParameters<typeof declared.TokenAuthError>
> = true;
"""

USE = """
import { TokenAuth, TokenAuthError, type LogoutReason } from "./tokenauth.js";

const auth = new TokenAuth({ url: new URL("https://auth.example.com"), origins: ["https://api.example.com"] });
auth.addEventListener("logout", (event) => { const reason: LogoutReason = event.detail.reason; });
auth.addEventListener("login", () => {}, { once: true });
const { fetch }: { fetch: typeof globalThis.fetch } = auth;
const left: number = (auth.expiresAt ?? new Date()).getTime();
auth.login("ann", "x", { signal: new AbortController().signal }).catch((error: unknown) => {
  if (error instanceof TokenAuthError && error.code === "too_many_attempts") setTimeout(() => {}, error.retryAfter);
});
"""

MISUSE = [
    'new TokenAuth({ origin: "https://api.example.com" });',
    'new TokenAuth({ storage: "local" });',
    'auth.login("ann");',
    'auth.addEventListener("logout", (event) => event.detail.reason === "timeout");',
    '(error: TokenAuthError) => error.code === "wrong";',
    "auth.loggedIn = true;",
    "auth.token;",
]


DIFFERENT = [
    ("close(): void;", "close(): boolean;"),
    ("close(): void;", "close(): void; more(): void;"),
    ("get username(): string | null;", "get username(): string;"),
    ("options?: { signal?: AbortSignal }", "options?: { signal?: string }"),
    ("constructor(options?: TokenAuthOptions);", "constructor(options: TokenAuthOptions);"),
    ("readonly retryAfter: number | undefined;", "readonly retryAfter: string;"),
]
"""Changes to the declarations, after which they do not agree with the module."""


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """Copy the module, a second time under a name for which TypeScript finds no declarations."""
    for name in ("tokenauth.js", "tokenauth.d.ts"):
        shutil.copy(PAGES / name, tmp_path)
    shutil.copy(PAGES / "tokenauth.js", tmp_path / "implementation.js")
    return tmp_path


def mistakes(directory: Path, **files: str) -> list[str]:
    """Return what TypeScript finds in the module and in these files, which are written beside it."""
    if shutil.which("tsc") is None:
        skip_without("tsc", "apt-get install node-typescript")
    for name, text in files.items():
        (directory / f"{name}.ts").write_text(text)
    command = ["tsc", *OPTIONS.split(), "implementation.js", *(f"{name}.ts" for name in files)]
    done = subprocess.run(command, cwd=directory, capture_output=True, text=True, check=False)
    return [line for line in done.stdout.splitlines() if not line.startswith(" ")]  # further lines explain


def test_the_module_its_types_and_a_use_of_them_agree(directory: Path) -> None:
    assert mistakes(directory, agree=AGREE, use=USE) == []


@pytest.mark.faults  # a control: it shows that the comparison can fail
def test_different_declarations_do_not_agree(directory: Path) -> None:
    declared = (directory / "tokenauth.d.ts").read_text()
    files = {}
    for number, (written, changed) in enumerate(DIFFERENT):
        assert declared.count(written) == 1
        (directory / f"other{number}.d.ts").write_text(declared.replace(written, changed))
        files[f"agree{number}"] = AGREE.replace("./tokenauth.js", f"./other{number}.js")
    found = {line.partition(".")[0] for line in mistakes(directory, **files)}
    assert found == set(files)


def test_each_misuse_is_a_type_error(directory: Path) -> None:
    first = len(USE.splitlines()) + 1
    found = mistakes(directory, use=USE + "\n".join(MISUSE))
    assert [line.partition(",")[0] for line in found] == [f"use.ts({first + number}" for number in range(len(MISUSE))]


def test_each_error_code_is_raised_declared_and_documented() -> None:
    raised = set(re.findall(r'new TokenAuthError\(\s*"(\w+)"', (PAGES / "tokenauth.js").read_text()))
    union = (PAGES / "tokenauth.d.ts").read_text().partition("type TokenAuthErrorCode =")[2].partition("export")[0]
    table = (ROOT / "docs/javascript.md").read_text().partition("\n## Errors\n")[2].partition("\n## ")[0]
    declared = set(re.findall(r'\| "(\w+)"', union))
    assert raised == declared == set(re.findall(r"^\| `(\w+)` \|", table, re.MULTILINE))
    assert len(raised) == 11
