from wandazeta.__main__ import main

main()
