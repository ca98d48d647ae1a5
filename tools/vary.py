"""python -m tools.vary: variants of the scripts, see tools/study/vary.py."""
from tools.study.vary import main

if __name__ == "__main__":
    main()
