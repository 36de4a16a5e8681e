def show_status(f):
    pass
