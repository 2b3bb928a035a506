"""`python -m mara_integrations` is `mara-tools`."""

from mara_integrations.cli import main

if __name__ == "__main__":
    main()
