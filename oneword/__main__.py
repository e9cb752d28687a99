"""`python -m oneword` is the command `oneword`."""

from oneword.cli import main

raise SystemExit(main())
