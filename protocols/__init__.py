"""What goes over the wire. Sans-IO: no trio, no sockets, no files, no clock, no global random."""
