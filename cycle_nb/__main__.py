"`python -m cycle_nb`: the same as the command `cycle-nb`."
import sys
from .cli import main

if __name__ == '__main__': sys.exit(main())
