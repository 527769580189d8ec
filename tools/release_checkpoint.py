"""Make a folder fit for publication: the same as `h3scale checkpoint release`."""

import sys

from h3scale.cli.main import main

if __name__ == "__main__":
    sys.argv[1:1] = ["checkpoint", "release"]
    main()
