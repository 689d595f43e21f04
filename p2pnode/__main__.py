"""`python -m p2pnode`."""

from p2pnode.cli.main import main

if __name__ == "__main__":
    main()
