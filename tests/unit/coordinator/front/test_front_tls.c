/* TLS: the same routes through it, plain text refused, a client that leaves noticed. Method: a
 * certificate made here, OpenSSL as the client. */
#include "front_fixture.h"

#include <openssl/evp.h>
#include <openssl/pem.h>
#include <openssl/ssl.h>
#include <openssl/x509.h>
#include <stdlib.h>

static char key_file[] = "/tmp/heddle-key-XXXXXX", cert_file[] = "/tmp/heddle-cert-XXXXXX";

static void make_certificate(void)
{
    EVP_PKEY *key = EVP_EC_gen("P-256");
    X509 *cert = X509_new();
    X509_set_version(cert, 2);
    ASN1_INTEGER_set(X509_get_serialNumber(cert), 1);
    X509_gmtime_adj(X509_getm_notBefore(cert), -60);
    X509_gmtime_adj(X509_getm_notAfter(cert), 3600);
    X509_NAME_add_entry_by_txt(X509_get_subject_name(cert), "CN", MBSTRING_ASC, (const unsigned char *)"localhost", -1, -1, 0);
    X509_set_issuer_name(cert, X509_get_subject_name(cert));
    X509_set_pubkey(cert, key);
    assert_true(X509_sign(cert, key, EVP_sha256()) > 0);
    FILE *k = fdopen(mkstemp(key_file), "w"), *c = fdopen(mkstemp(cert_file), "w");
    assert_int_equal(PEM_write_PrivateKey(k, key, NULL, NULL, 0, NULL, NULL), 1);
    assert_int_equal(PEM_write_X509(c, cert), 1);
    fclose(k);
    fclose(c);
    X509_free(cert);
    EVP_PKEY_free(key);
}

static int begin(void **state)
{
    (void)state;
    make_certificate();
    fixture_begin();
    struct front_config c = fixture_config();
    c.http.tls_key_file = key_file;
    c.http.tls_cert_file = cert_file;
    fixture_open(&c);
    return 0;
}
static int end(void **state)
{
    (void)state;
    fixture_end();
    unlink(key_file);
    unlink(cert_file);
    return 0;
}

static SSL *tls_open(SSL_CTX *ctx, int *out_fd)
{
    SSL *ssl = SSL_new(ctx);
    *out_fd = client_open();
    SSL_set_fd(ssl, *out_fd);
    assert_int_equal(SSL_connect(ssl), 1);
    return ssl;
}

static void ask(SSL *ssl, const char *request, const char *mark, struct buf *in)
{
    assert_int_equal(SSL_write(ssl, request, (int)strlen(request)), (int)strlen(request));
    char bytes[4096];
    while (!in->n || !strstr(in->data, mark)) {
        int n = SSL_read(ssl, bytes, sizeof bytes);
        assert_true(n > 0);
        buf_add(in, bytes, (size_t)n);
    }
}

static void answers_through_tls(void **state)
{
    (void)state;
    SSL_CTX *ctx = SSL_CTX_new(TLS_client_method());
    struct buf in;
    int fd;
    buf_init(&in, 0);
    fake_reset("Hello");
    SSL *ssl = tls_open(ctx, &fd);
    ask(ssl, "GET /live HTTP/1.1\r\n\r\n", "{\"status\":\"ok\"}", &in);
    ask(ssl, "POST /v1/completions HTTP/1.1\r\nContent-Length: 30\r\n\r\n{\"prompt\":\"p\",\"stream\":true}  ", "data: [DONE]", &in);
    assert_non_null(strstr(in.data, "\"text\":\"H"));
    SSL_free(ssl);
    close(fd);
    fake.endless = true;
    buf_clear(&in);
    ssl = tls_open(ctx, &fd);
    ask(ssl, "POST /v1/completions HTTP/1.1\r\nContent-Length: 48\r\n\r\n{\"prompt\":\"p\",\"stream\":true,\"max_tokens\":2000 }  ", "data: ", &in);
    close(fd); /* gone without a word */
    assert_true(engine_idle(1000));
    SSL_free(ssl);
    SSL_CTX_free(ctx);
    buf_fini(&in);
}

static void plain_text_is_refused(void **state)
{
    (void)state;
    struct buf in;
    int fd = client_open();
    buf_init(&in, 0);
    client_send(fd, "GET /live HTTP/1.1\r\n\r\n", 22);
    assert_false(client_read_until(fd, "200", 3000, &in));
    assert_true(!in.n || !strstr(in.data, "HTTP"));
    close(fd);
    buf_fini(&in);
    struct front_config c = fixture_config();
    struct front *other = NULL;
    c.http.tls_cert_file = cert_file;
    assert_int_equal(front_create(&c, &other), ERR_INVALID);
    c.http.tls_key_file = cert_file;
    assert_int_equal(front_create(&c, &other), ERR_INVALID);
    c.http.tls_cert_file = "/nonexistent";
    assert_int_equal(front_create(&c, &other), ERR_INVALID);
    assert_non_null(strstr(err_detail(), "/nonexistent"));
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(answers_through_tls),
        cmocka_unit_test(plain_text_is_refused),
    };
    return cmocka_run_group_tests(tests, begin, end);
}
