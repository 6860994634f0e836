import sys

from avsep.export.runtime.separator import main

sys.exit(main())
