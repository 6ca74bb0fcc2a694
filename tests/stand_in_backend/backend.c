/* A Triton backend in Python, in the server's own process: the python backend cannot return implicit state.
 *
 * Compiled with PYTHON_LIBRARY, PYTHON_PROGRAM and FOLDER. stand_in.py registers what answers the server's calls.
 */
#include <dlfcn.h>
#include <stdint.h>
#include <wchar.h>

typedef void *(*Call)(void *instance, void **requests, uint32_t count); /* returns a TRITONSERVER_Error or NULL */

extern void *TRITONSERVER_ErrorNew(int code, const char *message);

static Call initialize, execute, finalize;

void stand_in_register(Call on_initialize, Call on_execute, Call on_finalize)
{
    initialize = on_initialize;
    execute = on_execute;
    finalize = on_finalize;
}

void *TRITONBACKEND_Initialize(void *backend)
{
    /* Global: Python's extension modules look for its symbols there. */
    void *python = dlopen(PYTHON_LIBRARY, RTLD_NOW | RTLD_GLOBAL);
    if (python == NULL)
        return TRITONSERVER_ErrorNew(1, dlerror());
    ((void (*)(const wchar_t *))dlsym(python, "Py_SetProgramName"))(PYTHON_PROGRAM);
    ((void (*)(int))dlsym(python, "Py_InitializeEx"))(0);
    int failed = ((int (*)(const char *))dlsym(python, "PyRun_SimpleString"))(
        "import sys; sys.path.insert(0, '" FOLDER "'); import stand_in");
    ((void *(*)(void))dlsym(python, "PyEval_SaveThread"))();
    return failed ? TRITONSERVER_ErrorNew(1, "stand_in.py does not run: see the server's log") : NULL;
}

void *TRITONBACKEND_ModelInstanceInitialize(void *instance)
{
    return initialize(instance, NULL, 0);
}

void *TRITONBACKEND_ModelInstanceExecute(void *instance, void **requests, const uint32_t count)
{
    return execute(instance, requests, count);
}

void *TRITONBACKEND_ModelInstanceFinalize(void *instance)
{
    return finalize(instance, NULL, 0);
}
