"""`python -m tiertree` is `tiertree`."""

from .cli import main

raise SystemExit(main())
