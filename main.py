from wandazeta.cli import main

main()
