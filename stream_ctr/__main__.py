"""`python -m stream_ctr`."""

from stream_ctr.cli.main import main

if __name__ == "__main__":
    main(prog_name="stream-ctr")
