"""`python -m tokenauth`."""

from tokenauth.cli.main import main

if __name__ == "__main__":
    main(prog_name="python -m tokenauth")
