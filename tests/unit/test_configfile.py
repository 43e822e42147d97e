"""The configuration file: each error is one line with its key path, and environment variables are expanded."""

import re
from pathlib import Path

import pytest

from tokenauth.errors import ConfigError
from tokenauth.nesting import toml_is_deeper_than
from tokenauth.settings import loader
from tokenauth.settings.dialects import PasswordDialectSettings
from tokenauth.settings.model import ServerSettings, Settings
from tokenauth.settings.user_editor import UserEditor

USER = '[[users]]\nusername = "ann"\npassword = "x"\n'

PORT = "must be an integer from 0 to 65535"
CAPACITY = "must be an integer from 0 to 100000000"
DURATION = "must be a duration from 1s to 3650d, such as '24h', '5m', '30s' or a number of seconds"
SCOPE = "must be a word of printable ASCII without blanks, quotes or backslashes"

MISTAKES = {
    "[sever]": "sever: there is no such key; did you mean server?",
    "[server]\nprot = 1": "server.prot: there is no such key; did you mean port?",
    "[server]\nzzz = 1": "server.zzz: there is no such key; known are host, port, socket, socket_mode, "
    "tls_certificate, tls_key, workers, cors_origins, trusted_proxies, accept_risks, access_log, docs, reload",
    "zzz = 1": "zzz: there is no such key; known are server, database, tokens, passwords, throttle, oauth, browser, "
    "metrics, audit, users_file, users, pools, dialects",
    "[[user]]": "user: there is no such key; did you mean users?",
    USER + 'scope = ["x"]': "users[0].scope: there is no such key; did you mean scopes?",
    USER + USER.replace("ann", "bob") + "x = 1": "users[1].x: there is no such key; known are username, "
    "password, scopes",
    '[server]\nport = "80"': "server.port: " + PORT + ", not a string",
    "[server]\nport = 1.5": "server.port: " + PORT + ", not 1.5",
    "[server]\nport = true": "server.port: " + PORT + ", not true",
    "[server]\nport = 2020-01-01": "server.port: " + PORT + ", not a date",
    "[server]\nhost = 1": "server.host: must be a host or address such as '127.0.0.1' (this machine only) or "
    "'0.0.0.0' (all of IPv4), not an integer",
    "[server]\naccess_log = 1": "server.access_log: must be true or false, not an integer",
    '[server]\ncors_origins = "x"': 'server.cors_origins: must be an array, not a string: write ["..."]',
    "[server]\ncors_origins = [1]": "server.cors_origins[0]: must be a string, not an integer",
    "server = 1": "server: must be a table, not an integer",
    "[[server]]": "server: must be a table, not an array: write [server], with one pair of brackets",
    "[users]": "users: must be an array, not a table: write [[users]], with two pairs of brackets",
    "[tokens]\nttl = 0": "tokens.ttl: " + DURATION + ", not 0",
    "[[users]]": "users[0].username: is missing",
    '[[users]]\nusername = "ann"': "users[0].password: is missing",
    USER + 'scopes = "admin"': 'users[0].scopes: must be an array, not a string: write ["..."]',
    USER + "scopes = [1]": "users[0].scopes[0]: " + SCOPE + ", not an integer",
    USER + USER: "users[1].username: 'ann' exists already (upper and lower case are the same): remove one of the two",
    "[server]\nport = 65536": "server.port: " + PORT + ", not 65536",
    '[tokens]\nttl = "soon"': "tokens.ttl: " + DURATION + ", not 'soon'",
    "[server]\nhost = '${NO}'": "server.host: the environment has no NO; set it, or write ${NO:-default}",
    USER + "scopes = ['a', '${NO}']": "users[0].scopes[1]: the environment has no NO; set it, or write ${NO:-default}",
    "[server]\nport = '${WORD}'": "server.port: " + PORT + ", not a string, from ${WORD}",
    "[server]\nport = '${REAL}'": "server.port: " + PORT + ", not a string, from ${REAL}",
    "[server]\nport = '${BIG}'": "server.port: " + PORT + ", from ${BIG}",
    "[server]\naccess_log = '${WORD}'": "server.access_log: must be true or false, not a string, from ${WORD}",
    "[tokens]\nttl = '${WORD}'": "tokens.ttl: " + DURATION + ", from ${WORD}",
    "[pools.a]\ncapacity = -1": "pools.a.capacity: " + CAPACITY + ", not -1",
    "[pools.a]\n[pools.b]\ncapacity = 1.5\n[pools.c]\nx = 1": "pools.b.capacity: " + CAPACITY + ", not 1.5",
    '[pools."v1.2"]\ncapacity = "1"': 'pools."v1.2".capacity: ' + CAPACITY + ", not a string",
    '[pools."v1.2"]\ncapacty = 1': 'pools."v1.2".capacty: there is no such key; did you mean capacity?',
    '[pools."v1.2"]\nlease_ttl = "soon"': 'pools."v1.2".lease_ttl: ' + DURATION + ", not 'soon'",
    '[pools."a\\"]\\n[b"]\ncapacity = -1': 'pools."a\\"]\\n[b".capacity: ' + CAPACITY + ", not -1",
    '[pools."[...]"]\ncapacity = []': 'pools."[...]".capacity: ' + CAPACITY + ", not an array",
    "[pools.a.b]": "pools.a.b: there is no such key; known are capacity, token_ttl, lease_ttl, lease_max, "
    "reclaim_delay, per_user, prefill, scope, manage_scope, log_leases, members",
    "[pools]\na = 1": "pools.a: must be a table, not an integer",
    f"server.socket = '/{'x' * 107}'": "server.socket: is a path of 108 bytes; a socket can have at most 107",
    "server.socket = '@name'": "server.socket: must be a path such as '/run/tokenauth/tokenauth.sock'",
    'server.socket = "/a\\u0000"': "server.socket: must be a path such as '/run/tokenauth/tokenauth.sock'"
    ", not '/a\\x00'",
    "server.tls_key = '/k'": "server.tls_certificate: is missing: tls_key needs it",
    "server.tls_certificate = '/c'": "server.tls_key: is missing: tls_certificate needs it",
    "server = {socket = '/s', tls_certificate = '/c', tls_key = '/k'}": "server.tls_certificate: must not be set with "
    "socket: TLS is the job of the proxy there",
    "server = {tls_certificate = '/c', tls_key = '/k'}\nbrowser.url = 'http://localhost:8000'": "browser.url: "
    "must begin with https, as there is a server.tls_certificate",
    "server.socket_mode = 660": "server.socket_mode: must be a mode in octal digits, such as '0660', not an integer",
    "server.socket_mode = '0980'": "server.socket_mode: must be a mode in octal digits, such as '0660', not '0980'",
    "[[pools]]": "pools: must be a table, not an array: write [pools.NAME], with one pair of brackets",
    "[pool.a]": "pool: there is no such key; did you mean pools?",
    "[pools.a]\ncapacity = '${WORD}'": "pools.a.capacity: " + CAPACITY + ", not a string, from ${WORD}",
    "[pools.'a.b']\ncapacity = '${BIG}'\nprefill = '${WORD}'": 'pools."a.b".prefill: must be true or false, not a '
    "string, from ${WORD}",
    "[pools.'a.b']\ncapacity = '${NO}'": 'pools."a.b".capacity: the environment has no NO; set it, or write '
    "${NO:-default}",
    "[dialects.token-poll]": "dialects.token-poll: there is no such key; did you mean token-pool?",
    "[dialects.token_pool]": "dialects.token_pool: there is no such key; did you mean token-pool?",
    "[dialects.zzz]": "dialects.zzz: there is no such key; known are simple-token-implement, token-pool, "
    "random-token-generator, token-management-service",
    "[dialects.token-pool]": "dialects.token-pool.pool: is missing",
    "[dialects.token-pool]\npool = 'p'\nrequire_tokens = 1": "dialects.token-pool.require_tokens: there is no such "
    "key; did you mean require_token?",
    "[dialects.token-pool]\npool = 'p'\npassword = 'x'": "dialects.token-pool.password: there is no such key; known "
    "are pool, prefix, require_token",
    "[dialects.simple-token-implement]\npool = 'p'": "dialects.simple-token-implement.password: is missing",
}

ENVIRON = {"WORD": "word", "BIG": "70000", "REAL": "1.5", "ONE": "1", "YES": "true", "NO_": "false", "EMPTY": ""}


def mistake(text: str) -> str:
    """Return the error for a text."""
    with pytest.raises(ConfigError) as refusal:
        loader.parse(text, ENVIRON)
    return str(refusal.value)


@pytest.mark.parametrize("text", MISTAKES)
def test_a_mistake_is_one_line_with_its_key_path(text: str) -> None:
    assert mistake(text) == MISTAKES[text]


@pytest.mark.parametrize(
    "text", ["port", "[server", "a = ", "a = 1\na = 2", "\x00", "a = '\x01'", "[a]\n[a]", "\ufeff"]
)
def test_a_file_that_is_not_toml_is_reported_as_such(text: str) -> None:
    assert mistake(text).startswith("not TOML: ")
    assert "\n" not in mistake(text)


TWICE = "; this table exists already: put all its keys under one header"
NOT_TOML = {
    "[server]\nhost = 127.0.0.1\nport = 1": """line 2, `host = ...`: *; strings need quotes: host = "...\"""",
    "[server]\nhost = localhost": """line 2, `host = ...`: *; strings need quotes: host = "...\"""",
    '[server]\nhost = "::1\nport = 1': """line 2, `host = ...`: *; the closing " is missing""",
    "[server]\nhost = '::1\nport = 1": """line 2, `host = ...`: *; the closing ' is missing""",
    "[server]\naccess_log = True": "line 2, `access_log = ...`: *; write true",
    "[server]\naccess_log = off": "line 2, `access_log = ...`: *; write true or false",
    "[server]\nport = 1\nport = 2": "line 3, `port = ...`: *; `port` is set already: remove one of the two",
    "[server]\n\n[server] # again": "line 3, `[server]`: *" + TWICE,
    "[pools.a]\n[pools.a]": "line 2, `[pools.a]`: *" + TWICE,
    "[server\nport = 1": "line 1, `[server`: Expected ']' at the end of a table declaration",
}


@pytest.mark.parametrize("text", NOT_TOML)
def test_text_that_is_not_toml_is_reported_with_its_line(text: str) -> None:
    begin, _, end = NOT_TOML[text].partition("*")
    found = mistake(text)
    assert found.startswith(f"not TOML: {begin}")
    assert found.endswith(end)


@pytest.mark.parametrize(
    "text",
    [
        'password = "s3cret',
        "password = s3cret",
        "password = 's3cret\nx = 1",
        "s3cret",
        "url = postgresql+asyncpg://ann:s3cret@host/db",
        'password = """\ns3cret = x',
        "password = '''\n[s3cret]\n'",
        'users = [{username = "ann", password = "s3cret" x}]',
        '"s3cret" "',
    ],
)
def test_text_that_is_not_toml_shows_no_secret(text: str) -> None:
    assert "s3cret" not in mistake(text)


@pytest.mark.parametrize(
    "text",
    [
        pytest.param("server.port = 1" + "0" * 5000, id="a number of 5,000 digits"),
        pytest.param("tokens.ttl = 1" + "0" * 400, id="a duration of 400 digits"),
        pytest.param("a = " + "[" * 5000, id="5,000 brackets"),
        pytest.param("a" + ".a" * 5000 + " = 1", id="5,000 dots"),
        pytest.param('"a\\nb" = 1', id="a key of two lines"),
        pytest.param("users = [" * 30 + "]" * 30, id="lists in lists"),
    ],
)
def test_a_hostile_file_is_one_line_too(text: str) -> None:
    assert "\n" not in mistake(text)


DEEP = {
    "brackets": "users = " + "[" * 33 + "]" * 33,
    "braces": "users = " + "{a = " * 33 + "1" + "}" * 33,
    "no end": "users = " + "[" * 100_000,
    "behind strings": r"""users = ['''x'''', "\"]", ']\', """ + "[" * 32 + "]" * 33,
    "behind five quotes": 'users = ["""x""""", ' + "[" * 32 + "]" * 33,
}


@pytest.mark.parametrize("text", DEEP.values(), ids=DEEP)
def test_nesting_is_bounded_before_it_is_parsed(text: str) -> None:
    assert mistake(text) == "arrays and tables are nested more than 32 deep"


def test_dotted_keys_are_bounded_too() -> None:
    assert mistake("server" + ".a" * 1000 + " = 1") == "server: arrays and tables are nested more than 32 deep"


STRINGS = ['"x[{"', "'x[{'", r"'x\'", r'"\"[{"', r'"""["{"""', '"""x[{"""""', "'''[\n'{'''", "'''x[{'''''"]


@pytest.mark.parametrize("string", STRINGS)
def test_brackets_in_strings_and_comments_do_not_nest(string: str) -> None:
    text = f'# [[[\n[a]  # [[[\nb = [{string}, {string}]  # "[[[\n'
    assert len(loader.parse_toml(text)["a"]["b"]) == 2
    assert not toml_is_deeper_than(1, text)
    assert toml_is_deeper_than(1, text + "c = [[]]")


def test_a_mistake_shows_no_password() -> None:
    for text in ('password = ["secret"]', 'password = {secret = "secret"}', 'username = ["secret"]\npassword = "x"'):
        assert "secret" not in mistake(f"[[users]]\n{text}")
    for password in ('["secret"]', '"my secret"', '"${WORD} secret"'):
        assert "secret" not in mistake(f"[dialects.simple-token-implement]\npool = 'p'\npassword = {password}")


def test_strings_expand_environment_variables() -> None:
    text = '[server]\nhost = "a${ONE}b${EMPTY}c${NONE:-x-y}d${NONE:-}$WORD"\ncors_origins = ["http://${WORD}"]'
    server = loader.parse(text, ENVIRON).server
    assert server.host == "a1bcx-yd$WORD"
    assert server.cors_origins == ("http://word",)


def test_a_set_nonempty_variable_overrides_the_default() -> None:
    """As in shells, since orchestrators may pass an unset variable as an empty one."""
    assert loader.parse("server.host = '${WORD:-other}'", ENVIRON).server.host == "word"
    assert loader.parse("server.host = '${EMPTY:-other}'", ENVIRON).server.host == "other"
    assert loader.parse("oauth.issuer = '${EMPTY}'", ENVIRON).oauth.issuer == ""


@pytest.mark.parametrize(
    "value",
    ["${API_PASSWORD", "${API_PASSWORD-s3cret}", "${API-PASSWORD}", "${API_PASSWORD:?no}", "${A:-${B}}", "x${}"],
)
def test_a_malformed_variable_is_refused_and_not_shown(value: str) -> None:
    """Otherwise the text itself would be the password."""
    text = f"[pools.p]\n[dialects.simple-token-implement]\npool = 'p'\npassword = '{value}'"
    found = mistake(text)
    assert found == (
        "dialects.simple-token-implement.password: has a '${' that begins neither ${NAME} nor ${NAME:-default}"
    )


def test_a_bad_environment_value_names_its_variable() -> None:
    with pytest.raises(ConfigError, match=r"^server.port: .*, from \$\{WORD\}$"):
        loader.parse("server.port = '${WORD}'", ENVIRON)


SECRETIVE = [
    "server.host = '${S}'",
    "server.port = '${S}'",
    "server.cors_origins = ['${S}']",
    "server.cors_origins = ['https://${S}']",
    "server.trusted_proxies = ['10.0.0.1', '${S}']",
    "server.accept_risks = ['${S}']",
    "database.connections = '${S}'",
    "tokens.ttl = '${S}'",
    "tokens.idle = '${N}'",
    "tokens = {ttl = 60, idle = '${N}'}",
    "tokens.max_named_ttl = 60\ntokens.named_ttl = '${N}'",
    "throttle.max_delay = '2h'\nthrottle.forget = '${N}'",
    "oauth.issuer = '${S}'",
    "oauth.issuer = 'https://${S}:x'",
    "browser.url = '${S}'",
    "browser.url = 'https://*.${S}'",
    "browser = {url = 'https://a.b', domain = '${S}'}",
    "browser = {url = 'https://a.b.c', domain = 'b.${D}'}",
    "browser = {url = 'https://a.b', return_to = ['${S}']}",
    "browser = {url = 'https://a.b', return_to = ['https://${D}']}",
    "browser = {url = 'https://a.b.c', domain = 'b.c', return_to = ['https://${D}']}",
    USER + "scopes = ['${S}']",
    "pools.p = {capacity = '${S}'}",
    "pools.p.scope = '${S}'",
    "pools.p = {}\ndialects.token-pool = {pool = '${S}'}",
    "pools.p = {}\ndialects.token-pool = {pool = 'p', prefix = '${S}'}",
]


@pytest.mark.parametrize("text", SECRETIVE)
def test_no_mistake_shows_the_value_of_a_variable(text: str) -> None:
    """It may be the wrong variable, which has a password."""
    with pytest.raises(ConfigError, match=r", from \$\{[SDN]\}$") as refusal:
        loader.parse(text, {"S": "hunter2 hunter2", "D": "hunter2.example", "N": "4711"})
    assert "hunter2" not in str(refusal.value)
    assert "471" not in str(refusal.value)


HUGE = {
    f"[server]\n\nport = 0x{'f' * 5000}": "server.port: " + PORT + ", not so long a number",
    f"[server]\n\nport = {'9' * 5000}": "not TOML: line 3: this number is too long",
    f"[tokens]\nttl = 0b{'1' * 50000}": "tokens.ttl: " + DURATION + ", not so long a number",
    f"{'k' * 5000} = 1": "k" * 80 + ": there is no such key; known are ",
}


@pytest.mark.parametrize("text", HUGE, ids=range(len(HUGE)))
def test_a_huge_number_or_key_is_reported_shortly(text: str) -> None:
    assert mistake(text).startswith(HUGE[text])
    assert len(mistake(text)) < 300


def test_lines_that_end_with_a_bare_return_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "config.toml"
    path.write_bytes(b"[server]\rport = 1\r")
    with pytest.raises(ConfigError, match="not TOML: line 1"):
        loader.load(path)
    path.write_bytes(b"[server]\r\nport = 1\r\n")
    assert loader.load(path).server.port == 1


def test_a_mistake_does_not_show_a_default_value() -> None:
    message = mistake("server.port = '${NONE:-s3cret}'")
    assert message == "server.port: " + PORT + ", not a string, from ${NONE}"


def test_options_replace_settings_of_the_server() -> None:
    settings = loader.parse("server = {host = 'h', port = 1, docs = false}", {})
    changed = loader.override(settings, host=None, port=2, workers=3)
    assert changed.server == ServerSettings(host="h", port=2, workers=3, docs=False)
    assert settings.server.port == 1


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"port": 65536}, "--port: " + PORT + ", not 65536"),
        ({"workers": 0}, "--workers: must be an integer from 1 to 64, not 0"),
        ({"host": "a b"}, "--host: must be a host or address such as "),
    ],
)
def test_an_option_has_the_bounds_of_its_setting(option: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}"):
        loader.override(Settings(), **option)


def test_a_byte_order_mark_is_accepted(tmp_path: Path) -> None:
    path = tmp_path / "config.toml"
    path.write_text("[server]\nport = 1\n", encoding="utf-8-sig")
    assert loader.load(path).server.port == 1


def test_environment_values_are_not_expanded_again() -> None:
    assert loader.parse("server.host = '${A}'", {"A": "${A}${B}"}).server.host == "${A}${B}"


def test_numbers_and_booleans_may_come_from_variables() -> None:
    text = """
    server = {port = "${PORT}", workers = "${NONE:-3}", access_log = "${LOG}"}
    tokens = {ttl = "${TTL}", per_user = "1${ZERO}"}
    throttle.delay = "${DELAY}"
    """
    settings = loader.parse(text, {"PORT": "8001", "LOG": "true", "TTL": "5m", "ZERO": "0", "DELAY": "2.5"})
    assert (settings.server.port, settings.server.workers, settings.server.access_log) == (8001, 3, True)
    assert (float(settings.tokens.ttl), settings.tokens.per_user, float(settings.throttle.delay)) == (300, 10, 2.5)


def test_pools_and_dialects_expand_variables_too() -> None:
    text = """
    pools.a = {capacity = "${ONE}"}
    pools.'b.c' = {capacity = "${BIG}", prefill = "${YES}", lease_ttl = "${NONE:-1800}", scope = "${ONE}"}
    dialects.simple-token-implement = {pool = "b.c", password = "${ONE}", require_token = "${YES}"}
    """
    settings = loader.parse(text, ENVIRON)
    assert settings.pools["a"].capacity == 1
    pool = settings.pools["b.c"]
    assert (pool.capacity, pool.prefill, float(pool.lease_ttl), pool.scope) == (70_000, True, 1800, "1")
    served = settings.dialects["simple-token-implement"]
    assert isinstance(served, PasswordDialectSettings)
    assert (served.password, served.require_token) == ("1", True)


@pytest.mark.parametrize(
    ("content", "value"),
    [(b"s3cret\n", "s3cret"), (b"s3cret\r\n", "s3cret"), (b"s3cret", "s3cret"), (b" s3cret ", " s3cret "), (b"", "")],
)
def test_a_variable_can_be_read_from_a_file(tmp_path: Path, content: bytes, value: str) -> None:
    """As Docker and Kubernetes pass secrets."""
    file = tmp_path / "secret"
    file.write_bytes(content)
    text = "[[users]]\nusername = 'ann'\npassword = 'x${HASH}'"
    for more in ({}, {"HASH": ""}):
        assert loader.parse(text, {"HASH_FILE": str(file), **more}).users[0].password == f"x{value}"


def test_a_file_of_a_variable_overrides_the_default(tmp_path: Path) -> None:
    file = tmp_path / "port"
    file.write_text("8001\n")
    text = "server.port = '${PORT:-8000}'"
    assert loader.parse(text, {"PORT_FILE": str(file)}).server.port == 8001
    file.write_text("\n")
    assert loader.parse(text, {"PORT_FILE": str(file)}).server.port == 8000


def test_a_variable_and_its_file_exclude_each_other(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as refusal:
        loader.parse("server.port = '${PORT}'", {"PORT": "8001", "PORT_FILE": "hunter2"})
    assert str(refusal.value) == "server.port: PORT and PORT_FILE are both set in the environment; unset one of them"


BROKEN_SECRETS = {
    "two lines": (b"hunter2\nhunter2\n", "must have one line of printable text, at most 65536 bytes; correct the file"),
    "two line breaks": (b"hunter2\n\n", "must have one line of printable text, at most 65536 bytes; correct the file"),
    "too long": (b"hunter2" * 10_000, "must have one line of printable text, at most 65536 bytes; correct the file"),
    "no UTF-8": (b"hunter2\xff", "is not printable text; correct HASH_FILE"),
    "a directory": (None, "cannot be read: it is not a regular file; correct HASH_FILE"),
    "nothing": (None, "cannot be read: No such file or directory; correct HASH_FILE"),
    "a NUL": (None, "is not printable text; correct HASH_FILE"),
}


@pytest.mark.parametrize("kind", BROKEN_SECRETS)
def test_a_broken_file_of_a_variable_is_not_shown(tmp_path: Path, kind: str) -> None:
    """Nor its path: someone may have set the variable to the secret itself."""
    content, problem = BROKEN_SECRETS[kind]
    file = tmp_path / "secret"
    if content is not None:
        file.write_bytes(content)
    named = {"a directory": str(tmp_path), "nothing": "hunter2", "a NUL": "hunter2\0"}.get(kind, str(file))
    with pytest.raises(ConfigError) as refusal:
        loader.parse("[[users]]\nusername = 'ann'\npassword = '${HASH}'", {"HASH_FILE": named})
    expected = f"users[0].password: the file that HASH_FILE in the environment names {problem}"
    assert str(refusal.value) == expected


def test_a_mistake_in_a_value_from_a_file_names_only_its_variable(tmp_path: Path) -> None:
    file = tmp_path / "secret"
    file.write_text("hunter2\n")
    with pytest.raises(ConfigError) as refusal:
        loader.parse("server.port = '${PORT}'", {"PORT_FILE": str(file)})
    assert str(refusal.value) == "server.port: must be an integer from 0 to 65535, not a string, from ${PORT}"


def test_numeric_text_stays_text_for_a_text_field() -> None:
    text = "[[users]]\nusername = '${ONE}'\npassword = '${YES}'\nscopes = ['${ONE}']"
    assert loader.parse(text, ENVIRON).users[0].username == "1"
    assert loader.parse(text, ENVIRON).users[0].password == "true"


def test_an_undecodable_environment_value_is_an_error() -> None:
    """Python decodes such bytes as lone surrogates, which can be neither hashed nor printed."""
    text = "[[users]]\nusername = 'ann'\npassword = '${HASH}'"
    with pytest.raises(ConfigError, match=r"^users\[0\]\.password: "):
        assert loader.parse(text, {"HASH": "\udcff"}).users_by_name


def test_option_then_variable_then_directory_find_the_file() -> None:
    named = {"TOKENAUTH_CONFIG": "/etc/tokenauth.toml"}
    assert loader.find("mine.toml", named) == Path("mine.toml")
    assert loader.find(None, named) == Path("/etc/tokenauth.toml")
    assert loader.find(None, {"TOKENAUTH_CONFIG": ""}) == Path("config.toml")
    assert loader.find(None, {}) == Path("config.toml")


def test_a_file_is_read_as_utf_8(tmp_path: Path) -> None:
    path = tmp_path / "config.toml"
    path.write_text(USER.replace("ann", "жанна"), encoding="utf-8")
    assert list(loader.load(path, {}).users_by_name) == ["жанна"]
    path.write_bytes(b"# nothing\r\n")
    assert loader.load(path, {}) == Settings()


@pytest.mark.parametrize("content", [None, b"\xff\xfe", b"[server]\nport = 0x", b"port = 1"])
def test_a_mistake_in_a_file_names_the_file(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "config.toml"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ConfigError) as refusal:
        loader.load(path, {})
    assert str(refusal.value).startswith(f"{path}: ")
    assert "\n" not in str(refusal.value)


def test_bytes_that_are_not_utf_8_are_reported_by_line(tmp_path: Path) -> None:
    path = tmp_path / "config.toml"
    path.write_bytes("# one\n# zwei\n# drei Käse".encode("latin-1"))
    for read in (loader.load, UserEditor):
        with pytest.raises(ConfigError, match=r"line 3 is not UTF-8: save the file as UTF-8$"):
            read(path)


def test_a_directory_is_not_a_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        loader.load(tmp_path, {})
