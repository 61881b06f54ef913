"""Groups of workers that hold a stage together: what each member holds and takes."""
