"""Circuit Relay v2 over our own streams: the relay (server), those who use one (client, reservations).

The library's relay ends all circuits of a listener with one of them, takes `data=0` for nothing and renews too late;
only its generated messages are used. https://github.com/libp2p/specs/blob/master/relay/circuit-v2.md
"""
