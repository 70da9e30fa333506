"""`python -m benchmarks.claims`."""

from benchmarks.claims.run import main

raise SystemExit(main())
