"""The commands of `blossomrec`, one module each: `main()` reads its options from `sys.argv`."""
