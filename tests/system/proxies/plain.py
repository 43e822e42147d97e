"""Configurations of a proxy in front of tokenauth, with the usual settings for WebSockets."""

from collections.abc import Mapping

PLAIN: Mapping[str, Mapping[str, str]] = {
    "nginx": {
        "/etc/nginx/conf.d/app.conf": """
map $http_upgrade $connection_upgrade {
    default upgrade;
    ''      close;
}
upstream tokenauth {
    server 127.0.0.1:8000;
    keepalive 32;
}
server {
    listen 0.0.0.0:8080;
    access_log off;
    location / {
        proxy_pass http://tokenauth;
        proxy_http_version 1.1;
        proxy_set_header Host $host;
        proxy_set_header Upgrade $http_upgrade;
        proxy_set_header Connection $connection_upgrade;
        proxy_request_buffering off;
    }
}
"""
    },
    "caddy": {
        "/etc/caddy/Caddyfile": """
{
	admin off
	auto_https off
}
http://:8080 {
	bind 0.0.0.0
	reverse_proxy 127.0.0.1:8000
}
"""
    },
    "haproxy": {
        "/etc/haproxy/haproxy.cfg": """
defaults
    mode http
    timeout connect 1s
    timeout client 30s
    timeout server 30s
    timeout tunnel 1h
    http-reuse always
listen app
    bind 0.0.0.0:8080
    server tokenauth 127.0.0.1:8000
"""
    },
    "traefik": {
        "/etc/traefik/traefik.yml": """
global: {checkNewVersion: false, sendAnonymousUsage: false}
entryPoints: {web: {address: "0.0.0.0:8080"}}
providers: {file: {filename: /etc/traefik/app.yml}}
log: {level: ERROR}
""",
        "/etc/traefik/app.yml": """
http:
  routers: {app: {entryPoints: [web], rule: "PathPrefix(`/`)", service: app}}
  services: {app: {loadBalancer: {servers: [{url: "http://127.0.0.1:8000"}]}}}
""",
    },
    "envoy": {
        "/etc/envoy/envoy.yaml": r"""
static_resources:
  listeners:
    - name: app
      address: {socket_address: {address: 0.0.0.0, port_value: 8080}}
      filter_chains:
        - filters:
            - name: envoy.filters.network.http_connection_manager
              typed_config:
                "@type": "type.googleapis.com/\
                  envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager"
                stat_prefix: app
                upgrade_configs: [{upgrade_type: websocket}, {upgrade_type: h2c}]
                http_filters:
                  - name: route
                    typed_config:
                      "@type": type.googleapis.com/envoy.extensions.filters.http.router.v3.Router
                route_config:
                  virtual_hosts:
                    - name: app
                      domains: ["*"]
                      routes: [{match: {prefix: /}, route: {cluster: app}}]
  clusters:
    - name: app
      connect_timeout: 1s
      load_assignment:
        cluster_name: app
        endpoints:
          - lb_endpoints:
              - endpoint: {address: {socket_address: {address: 127.0.0.1, port_value: 8000}}}
"""
    },
}
