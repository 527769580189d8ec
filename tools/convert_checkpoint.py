"""Write a model in another layout: the same as `h3scale checkpoint convert`."""

import sys

from h3scale.cli.main import main

if __name__ == "__main__":
    sys.argv[1:1] = ["checkpoint", "convert"]
    main()
