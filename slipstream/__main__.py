"""python -m slipstream is slipstream; so launchers that run modules, such as torchrun, can."""

from slipstream.cli import main

if __name__ == "__main__":
    main()
