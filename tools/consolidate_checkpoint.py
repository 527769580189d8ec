"""Turn a sharded training checkpoint into a Hugging Face folder: the same as `h3scale checkpoint consolidate`."""

import sys

from h3scale.cli.main import main

if __name__ == "__main__":
    sys.argv[1:1] = ["checkpoint", "consolidate"]
    main()
