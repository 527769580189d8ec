"""Say what a checkpoint or model is: the same as `h3scale checkpoint inspect`."""

import sys

from h3scale.cli.main import main

if __name__ == "__main__":
    sys.argv[1:1] = ["checkpoint", "inspect"]
    main()
