"""Check that a model folder is whole, and is what was trained: the same as `h3scale checkpoint verify`."""

import sys

from h3scale.cli.main import main

if __name__ == "__main__":
    sys.argv[1:1] = ["checkpoint", "verify"]
    main()
