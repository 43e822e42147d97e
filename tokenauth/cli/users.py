"""Edit the users in config.toml."""

import shlex

import click

from tokenauth.cli.base import (
    CommandGroup,
    config_option,
    config_path,
    json_option,
    load_settings,
    new_hash,
    options,
    password_option,
    print_json,
    program,
    record_change,
    show_table,
)
from tokenauth.logs import printable

_STAYS = "Existing logins stay valid until you reload"


def _say_saved(config_file: str | None, until: str) -> None:
    """Say when a running server uses the new file; `until` is what holds until a reload."""
    if load_settings(config_file).server.reload == "watch":
        click.echo("Saved. A running server uses it within a few seconds.")
    else:
        command = f"`{program()} reload{options(config_file)}`"
        click.echo(f"Saved. {until}: {command}, or `systemctl reload tokenauth`.")


@click.group(cls=CommandGroup)
def user() -> None:
    """Edit the users in config.toml.

    Comments in the file are kept. A running server applies the change when you reload it. Users of a users_file are
    only listed: edit these with htpasswd.
    """


@user.command("add", epilog="Example: tokenauth user add ann --scope reports --scope admin")
@config_option
@password_option
@click.argument("name")
@click.option("--scope", "scopes", multiple=True, metavar="SCOPE", help="A scope of the user. Repeat for several.")
def user_add(config_file: str | None, password_stdin: bool, name: str, scopes: tuple[str, ...]) -> None:
    """Add the user NAME."""
    from tokenauth.settings.user_editor import UserEditor

    file = UserEditor(config_path(config_file))
    file.add(name, lambda: new_hash(config_file, password_stdin), scopes)
    record_change("user_added", config_file, user=name, scopes=scopes)
    _say_saved(config_file, f"{name!r} can log in once you reload")


@user.command("passwd", epilog="Example: tokenauth user passwd admin")
@config_option
@password_option
@click.argument("name")
def user_passwd(config_file: str | None, password_stdin: bool, name: str) -> None:
    """Change the password of NAME.

    The next reload revokes the tokens that were issued for the old password.
    """
    from tokenauth.settings.user_editor import UserEditor

    file = UserEditor(config_path(config_file))
    file.change_password(name, lambda: new_hash(config_file, password_stdin))
    record_change("user_password_changed", config_file, user=name)
    _say_saved(config_file, _STAYS)


@user.command("set-scopes", epilog="Example: tokenauth user set-scopes ann --scope reports")
@config_option
@click.argument("name")
@click.option("--scope", "scopes", multiple=True, metavar="SCOPE", help="A scope of the user. Repeat for several.")
def user_set_scopes(config_file: str | None, name: str, scopes: tuple[str, ...]) -> None:
    """Replace the scopes of NAME. Without --scope, the user has none.

    The next reload applies them to existing tokens, too.
    """
    from tokenauth.settings.user_editor import UserEditor

    file = UserEditor(config_path(config_file))
    before = file.change_scopes(name, scopes)
    record_change("user_scopes_changed", config_file, user=name, scopes=scopes, scopes_before=before)
    _say_saved(config_file, "The scopes change when you reload")


@user.command("remove", epilog="Example: tokenauth user remove ann")
@config_option
@click.argument("name")
def user_remove(config_file: str | None, name: str) -> None:
    """Remove the user NAME.

    After the next reload, the tokens of the user are refused while the user is not in the file. To end them for good,
    and the leases too, run `tokenauth tokens revoke --user NAME --leases` after the reload.
    """
    from tokenauth.settings.user_editor import UserEditor

    file = UserEditor(config_path(config_file))
    before = file.remove(name)
    record_change("user_removed", config_file, user=name, scopes_before=before)
    _say_saved(config_file, _STAYS)
    command = f"{program()} tokens revoke --user {shlex.quote(name)} --leases{options(config_file)}"
    click.echo(printable(f"Then `{command}` ends what is left."))


@user.command("list", epilog="Example: tokenauth user list --json")
@config_option
@json_option
def user_list(config_file: str | None, as_json: bool) -> None:
    """List the users, their scopes and their files."""
    settings = load_settings(config_file)
    rows: list[dict[str, object]] = [
        {"username": user.username, "scopes": list(user.scopes), "file": str(user.origin or config_path(config_file))}
        for user in settings.users_by_name.values()
    ]
    if as_json:
        print_json({"users": rows})
    else:
        show_table(rows if settings.users_file.path else [{**row, "file": None} for row in rows], "users")
